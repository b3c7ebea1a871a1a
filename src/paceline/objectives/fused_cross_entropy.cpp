// Cross-entropy of bf16 logits on CPUs, with its gradient in their place: a row is read from memory once and written once.
//
// A row's exponentials stay in a buffer of the thread's own, near the processor. Everything is computed in fp32 and the
// gradient rounded once. A row is one thread's work, so the result does not depend on the number of threads.
//
// Shapes: C rows, V vocabulary.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bf16.h"

extern "C" {

// Losses (C,) in fp32; with `learns` the gradient of their sum takes the place of the logits (C, V), which are dense.
// Returns 1 if a label is outside of the vocabulary, else 0.
int paceline_cross_entropy(Bits* logits_CV, const int64_t* labels_C, float* losses_C, int64_t C, int64_t V,
                           int32_t learns, int32_t threads) {
    std::atomic<int> failed{0};
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> powers_V(V);
        float* powers = powers_V.data();
#pragma omp for schedule(static)
        for (int64_t c = 0; c < C; c++) {
            Bits* row = logits_CV + c * V;
            int64_t label = labels_C[c];
            if (label < 0 || label >= V) {
                failed = 1;
                continue;
            }
            float greatest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : greatest)
            for (int64_t v = 0; v < V; v++) greatest = std::max(greatest, widened(row[v]));
#pragma omp simd reduction(+ : sum)
            for (int64_t v = 0; v < V; v++) sum += powers[v] = exponential(widened(row[v]) - greatest);
            losses_C[c] = greatest + std::log(sum) - widened(row[label]);
            if (!learns) continue;
            float share = 1.0f / sum;
#pragma omp simd
            for (int64_t v = 0; v < V; v++) powers[v] *= share;
            powers[label] -= 1.0f;
            round_all(powers, V, row);
        }
    }
    return failed;
}
}
