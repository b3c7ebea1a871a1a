// Attention for bf16 on CPUs in one pass over the keys, forward and backward (Dao et al. 2022, arXiv 2205.14135).
//
// A block of scores is a product in fp32 that stays in the nearest cache; its probabilities go into the next product at
// once. Products are torch's brgemm, which multiplies bf16 with fp32 sums at the speed of the matrix units; its right
// factor wants two rows of the inner dimension side by side ("pairs"). A key/value head with its query heads is one
// thread's work, so the result does not depend on the number of threads.
//
// Shapes: B batch, N query heads, K key/value heads, Q queries, S keys, H width of a query or key, V width of a value.
// Tensors are (B, position, head, width) with strides of their own, the width's being 1; H and V are even.

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bf16.h"

using at::native::cpublas::brgemm;
using Bf16 = at::BFloat16;

namespace {

constexpr int64_t R = 128;  // queries of a block
constexpr int64_t C = 128;  // keys of a block
constexpr int64_t D = 32;   // keys of one in which some queries do not see some keys

struct Sizes {
    int64_t batch, heads, key_heads, queries, keys, width, value_width;
    float scale;
    int32_t causal, threads;
};

struct View {  // of a (B, position, head, width) tensor
    Bf16* data;
    int64_t batch, position, head;  // strides

    Bf16* at(int64_t b, int64_t i, int64_t n) const { return data + b * batch + i * position + n * head; }
};

const Bf16* as_bf16(const void* x) { return static_cast<const Bf16*>(x); }

int64_t even(int64_t n) { return n + (n & 1); }

// (n, w) with rows `stride` apart -> pairs along w: (w / 2, n, 2).
void pair_columns(const Bf16* x, int64_t stride, int64_t n, int64_t w, uint32_t* pairs) {
    constexpr int64_t TILE = 16;
    for (int64_t begin = 0; begin < n; begin += TILE) {
        int64_t end = std::min(n, begin + TILE);
        for (int64_t j = 0; j < w / 2; j++)
            for (int64_t i = begin; i < end; i++) std::memcpy(&pairs[j * n + i], x + i * stride + 2 * j, 4);
    }
}

// (n, w) with rows `stride` apart -> pairs along n: (ceil(n / 2), w, 2); a row of zeros makes the number even.
void pair_rows(const void* x, int64_t stride, int64_t n, int64_t w, Bits* pairs) {
    const Bits* rows = static_cast<const Bits*>(x);
    for (int64_t i = 0; i < n; i += 2) {
        const Bits *one = rows + i * stride, *other = one + stride;
        Bits* out = pairs + i * w;
        if (i + 1 < n)
            for (int64_t j = 0; j < w; j++) out[2 * j] = one[j], out[2 * j + 1] = other[j];
        else
            for (int64_t j = 0; j < w; j++) out[2 * j] = one[j], out[2 * j + 1] = 0;
    }
}

// (n, w) with rows `stride` apart -> (w, ld), zeros behind column n.
void transpose(const void* x, int64_t stride, int64_t n, int64_t w, int64_t ld, Bits* out) {
    constexpr int64_t TILE = 32;
    const Bits* rows = static_cast<const Bits*>(x);
    for (int64_t begin = 0; begin < n; begin += TILE) {
        int64_t end = std::min(n, begin + TILE);
        for (int64_t j = 0; j < w; j++)
            for (int64_t i = begin; i < end; i++) out[j * ld + i] = rows[i * stride + j];
    }
    for (int64_t j = 0; j < w; j++) std::fill(out + j * ld + n, out + (j + 1) * ld, 0);
}

void write(const float* x, int64_t w, float factor, Bf16* out) {
    Bits* bits = reinterpret_cast<Bits*>(out);
#pragma omp simd
    for (int64_t j = 0; j < w; j++) bits[j] = rounded(x[j] * factor);
}

// The keys that a block of queries sees.
int64_t visible(const Sizes& z, int64_t first_query, int64_t queries) {
    return z.causal ? std::min(z.keys, first_query + queries) : z.keys;
}

// How many keys a block has from key c on. Narrow blocks along the diagonal leave out most products of which nothing is
// seen.
int64_t width_at(const Sizes& z, int64_t c, int64_t first_query) { return z.causal && c >= first_query ? D : C; }

// How many of a block's queries see no key from key c on.
int64_t blind_rows(const Sizes& z, int64_t c, int64_t first_query) {
    return z.causal ? std::max<int64_t>(0, c - first_query) : 0;
}

class Forward {
  public:
    Forward(const Sizes& z, View query, View key, View value, View output, float* lse_BNQ)
        : z(z), query(query), key(key), value(value), output(output), lse_BNQ(lse_BNQ),
          keys_HS2(z.width / 2 * z.keys), values_SV2(even(z.keys) * z.value_width), scores_RC(R * C),
          output_RV(R * z.value_width), greatest_R(R), sum_R(R), probabilities_RC(R * C) {}

    void run(int64_t b, int64_t k) {
        int64_t group = z.heads / z.key_heads;
        pair_columns(key.at(b, 0, k), key.position, z.keys, z.width, keys_HS2.data());
        pair_rows(value.at(b, 0, k), value.position, z.keys, z.value_width, values_SV2.data());
        for (int64_t n = k * group; n < (k + 1) * group; n++)
            for (int64_t first = 0; first < z.queries; first += R) rows(b, n, first, std::min(R, z.queries - first));
    }

  private:
    void rows(int64_t b, int64_t n, int64_t first, int64_t count) {
        int64_t seen = visible(z, first, count), V = z.value_width;
        for (int64_t c = 0, columns; c < seen; c += columns) {
            columns = std::min(width_at(z, c, first), seen - c);
            int64_t blind = blind_rows(z, c, first), rows = count - blind;
            brgemm(rows, columns, z.width, query.position, z.keys, C, false, query.at(b, first + blind, n),
                   as_bf16(keys_HS2.data() + c), &scores_RC[blind * C]);
            for (int64_t i = blind; i < count; i++)
                softmax(i, z.causal ? std::clamp<int64_t>(first + i + 1 - c, 0, columns) : columns, columns, c == 0);
            brgemm(rows, V, even(columns), C, V, V, c > 0, as_bf16(&probabilities_RC[blind * C]),
                   as_bf16(values_SV2.data() + c * V), &output_RV[blind * V]);
        }
        for (int64_t i = 0; i < count; i++) {
            write(&output_RV[i * V], V, 1.0f / sum_R[i], output.at(b, first + i, n));
            lse_BNQ[(b * z.heads + n) * z.queries + first + i] = greatest_R[i] + std::log(sum_R[i]);
        }
    }

    // Probabilities of row i, up to their sum, of which the first `seen` of `columns` are seen; what was summed with
    // a smaller greatest score is brought to the new one.
    void softmax(int64_t i, int64_t seen, int64_t columns, bool is_first) {
        float* scores = &scores_RC[i * C];
        Bits* probabilities = &probabilities_RC[i * C];
        float greatest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : greatest)
        for (int64_t j = 0; j < seen; j++) greatest = std::max(greatest, scores[j]);
        greatest = is_first ? greatest * z.scale : std::max(greatest_R[i], greatest * z.scale);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < seen; j++) {
            float p = exponential(scores[j] * z.scale - greatest);
            scores[j] = p;
            sum += p;
        }
        round_all(scores, seen, probabilities);
        std::fill(probabilities + seen, probabilities + even(columns), 0);
        if (is_first) {
            sum_R[i] = sum;
        } else {
            float factor = std::exp(greatest_R[i] - greatest);
            sum_R[i] = sum_R[i] * factor + sum;
            float* output = &output_RV[i * z.value_width];
#pragma omp simd
            for (int64_t j = 0; j < z.value_width; j++) output[j] *= factor;
        }
        greatest_R[i] = greatest;
    }

    const Sizes z;
    const View query, key, value, output;
    float* const lse_BNQ;
    std::vector<uint32_t> keys_HS2;
    std::vector<Bits> values_SV2;
    std::vector<float> scores_RC, output_RV, greatest_R, sum_R;
    std::vector<Bits> probabilities_RC;
};

// Scores and their gradients are computed as keys x queries: so they are the left factors of the gradients of keys and
// values as they are, and of that of the queries after two rows have been put side by side.
class Backward {
  public:
    Backward(const Sizes& z, View grad, View query, View key, View value, View output, const float* lse_BNQ,
             View grad_query, View grad_key, View grad_value)
        : z(z), grad(grad), query(query), key(key), value(value), output(output), lse_BNQ(lse_BNQ),
          grad_query(grad_query), grad_key(grad_key), grad_value(grad_value), keys_HS(z.width * even(z.keys)),
          queries_HR2(z.width / 2 * R), grads_VR2(z.value_width / 2 * R), queries_RH2(R * z.width),
          grads_RV2(R * z.value_width), scores_CR(C * R), slopes_CR(C * R), probabilities_CR(C * R),
          score_grads_CR(C * R), score_grads_CR2(C * R), inner_R(R), grad_key_SH(z.keys * z.width),
          grad_value_SV(z.keys * z.value_width), grad_query_HR(z.width * R) {}

    void run(int64_t b, int64_t k) {
        int64_t group = z.heads / z.key_heads;
        transpose(key.at(b, 0, k), key.position, z.keys, z.width, even(z.keys), keys_HS.data());
        std::fill(grad_key_SH.begin(), grad_key_SH.end(), 0.0f);
        std::fill(grad_value_SV.begin(), grad_value_SV.end(), 0.0f);
        for (int64_t n = k * group; n < (k + 1) * group; n++)
            for (int64_t first = 0; first < z.queries; first += R) rows(b, k, n, first, std::min(R, z.queries - first));
        for (int64_t i = 0; i < z.keys; i++) {
            write(&grad_key_SH[i * z.width], z.width, 1.0f, grad_key.at(b, i, k));
            write(&grad_value_SV[i * z.value_width], z.value_width, 1.0f, grad_value.at(b, i, k));
        }
    }

  private:
    void rows(int64_t b, int64_t k, int64_t n, int64_t first, int64_t count) {
        const Bf16 *queries = query.at(b, first, n), *grads = grad.at(b, first, n);
        int64_t H = z.width, V = z.value_width, seen = visible(z, first, count);
        pair_columns(queries, query.position, count, H, queries_HR2.data());
        pair_columns(grads, grad.position, count, V, grads_VR2.data());
        pair_rows(queries, query.position, count, H, queries_RH2.data());
        pair_rows(grads, grad.position, count, V, grads_RV2.data());
        for (int64_t i = 0; i < count; i++) {
            const Bf16 *g = grads + i * grad.position, *o = output.at(b, first + i, n);
            inner_R[i] = 0.0f;
            for (int64_t j = 0; j < V; j++) inner_R[i] += static_cast<float>(g[j]) * static_cast<float>(o[j]);
        }
        for (int64_t c = 0, columns; c < seen; c += columns) {
            columns = std::min(width_at(z, c, first), seen - c);
            int64_t blind = blind_rows(z, c, first), rows = count - blind;
            brgemm(columns, rows, H, key.position, count, R, false, key.at(b, c, k),
                   as_bf16(queries_HR2.data() + blind), &scores_CR[blind]);
            brgemm(columns, rows, V, value.position, count, R, false, value.at(b, c, k),
                   as_bf16(grads_VR2.data() + blind), &slopes_CR[blind]);
            differentiate(lse_BNQ + (b * z.heads + n) * z.queries + first, c - first, columns, blind, count);
            brgemm(columns, V, even(rows), R, V, V, true, as_bf16(&probabilities_CR[blind]),
                   as_bf16(&grads_RV2[blind * V]), &grad_value_SV[c * V]);
            brgemm(columns, H, even(rows), R, H, H, true, as_bf16(&score_grads_CR[blind]),
                   as_bf16(&queries_RH2[blind * H]), &grad_key_SH[c * H]);
            brgemm(H, rows, even(columns), even(z.keys), rows, R, c > 0, as_bf16(keys_HS.data() + c),
                   as_bf16(score_grads_CR2.data()), &grad_query_HR[blind]);
        }
        for (int64_t i = 0; i < count; i++) {
            Bits* out = reinterpret_cast<Bits*>(grad_query.at(b, first + i, n));
            for (int64_t h = 0; h < H; h++) out[h] = rounded(grad_query_HR[h * R + i]);
        }
    }

    // Probabilities and the gradients of scores for queries from `blind` on; key c of the block is seen from query
    // c + ahead of it on.
    void differentiate(const float* lse, int64_t ahead, int64_t columns, int64_t blind, int64_t count) {
        for (int64_t c = 0; c < columns; c++) {
            float *scores = &scores_CR[c * R], *slopes = &slopes_CR[c * R];
            const float *inner = inner_R.data();
            Bits *probabilities = &probabilities_CR[c * R], *gradients = &score_grads_CR[c * R];
            int64_t first = z.causal ? std::clamp<int64_t>(c + ahead, blind, count) : 0;
            std::fill(probabilities + blind, probabilities + first, 0);
            std::fill(gradients + blind, gradients + first, 0);
#pragma omp simd
            for (int64_t r = first; r < count; r++) {
                float p = exponential(scores[r] * z.scale - lse[r]);
                scores[r] = p;
                slopes[r] = p * (slopes[r] - inner[r]) * z.scale;
            }
            round_all(scores + first, count - first, probabilities + first);
            round_all(slopes + first, count - first, gradients + first);
            std::fill(probabilities + count, probabilities + even(count), 0);
            std::fill(gradients + count, gradients + even(count), 0);
        }
        pair_rows(&score_grads_CR[blind], R, columns, count - blind, score_grads_CR2.data());
    }

    const Sizes z;
    const View grad, query, key, value, output;
    const float* const lse_BNQ;
    const View grad_query, grad_key, grad_value;
    std::vector<Bits> keys_HS;
    std::vector<uint32_t> queries_HR2, grads_VR2;
    std::vector<Bits> queries_RH2, grads_RV2;
    std::vector<float> scores_CR, slopes_CR;  // slopes: gradients of probabilities
    std::vector<Bits> probabilities_CR, score_grads_CR, score_grads_CR2;
    std::vector<float> inner_R, grad_key_SH, grad_value_SV, grad_query_HR;
};

// Runs every key/value head on some thread; 1 if torch cannot do the products on this processor, else 0.
template <typename Worker, typename... Arguments>
int run(const Sizes& z, Arguments... arguments) {
    std::atomic<int> failed{0};
#pragma omp parallel num_threads(z.threads)
    {
        Worker worker(z, arguments...);
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t b = 0; b < z.batch; b++)
            for (int64_t k = 0; k < z.key_heads; k++) {
                try {
                    worker.run(b, k);
                } catch (const std::exception&) {
                    failed = 1;
                }
            }
        at::native::cpublas::brgemm_release();
    }
    return failed;
}

}  // namespace

extern "C" {

// The output, and the logarithm of each query's sum of exponentials (B, N, Q) in fp32.
int paceline_attention(const Sizes* sizes, const View* query, const View* key, const View* value, const View* output,
                       float* lse_BNQ) {
    return run<Forward>(*sizes, *query, *key, *value, *output, lse_BNQ);
}

int paceline_attention_backward(const Sizes* sizes, const View* grad, const View* query, const View* key,
                                const View* value, const View* output, const float* lse_BNQ, const View* grad_query,
                                const View* grad_key, const View* grad_value) {
    return run<Backward>(*sizes, *grad, *query, *key, *value, *output, lse_BNQ, *grad_query, *grad_key, *grad_value);
}
}
