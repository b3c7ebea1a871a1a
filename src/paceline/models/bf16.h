// What kernels for bf16 on CPUs have in common.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

using Bits = uint16_t;  // of a bf16

// e^x for x <= 0 to about one part in 10^7, no less than e^-87 = 1.6e-38: a polynomial for the fraction of the power of two.
inline float exponential(float x) {
    float power = std::max(x, -87.0f) * 1.44269504f;
    float whole = std::nearbyint(power), f = power - whole;
    float p = 1.54035304e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

inline Bits rounded(float x) {  // to the nearest, ties to even; what is not a number stays so
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    Bits near = static_cast<Bits>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : near;
}

inline float widened(Bits x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float exact;
    std::memcpy(&exact, &bits, 4);
    return exact;
}

// `rounded` for n values, by the processor's own instruction where it has one (which takes the smallest numbers, below
// 1.2e-38, for zero).
inline void round_all(const float* x, int64_t n, Bits* out) {
    int64_t j = 0;
#ifdef __AVX512BF16__
    for (; j + 16 <= n; j += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + j)));
#endif
    for (; j < n; j++) out[j] = rounded(x[j]);
}
