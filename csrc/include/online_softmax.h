// The state of a softmax that is computed in pieces. Every attention kernel and every merge uses it.
//
// Over the scores x_j (in units of log2) and values v_j seen so far the state is
//   max = max_j x_j,   sum = sum_j 2**(x_j - max),   acc = sum_j 2**(x_j - max) v_j,
// and each kernel stores the row `acc` in its own way. The result is acc / sum, and the log-sum-exp is max
// + log2(sum). Two states are merged by scaling both to the larger max. This is associative up to rounding,
// and commutative to the bit.
//
// The empty state is (-inf, 0, 0). Its max must never be subtracted from itself (-inf - -inf is NaN), so
// `weight` returns 0 for it. Merging with it returns the other state bit for bit (a weight of 1, plus 0),
// except that zeros of its row become +0.
// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867).
#pragma once

#include "vec_math.h"

TTS_BEGIN_ISA

inline constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

struct SoftmaxState {
    float max = -kInfinity, sum = 0.0f;

    bool empty() const { return max == -kInfinity && sum == 0.0f; }
    // The log-sum-exp, natural.
    float lse() const { return empty() ? -kInfinity : (max + log2(sum)) * kLn2; }
};

// The factor of a state's sum and row when its max rises to `top`.
inline float weight(float max, float top) {
    return max == top ? 1.0f : max == -kInfinity ? 0.0f : exp2(max - top);
}

// 2**r for |r| <= 1/2, within 3e-6 (degree 4) or 1e-7 (degree 5) relative: minimax polynomials with p(0) = 1.
template <int kDegree>
inline Vec exp2_near_zero(Vec r) {
    constexpr float c4[] = {6.931242e-1f, 2.4024099e-1f, 5.5906426e-2f, 9.582853e-3f};
    constexpr float c5[] = {6.93147e-1f, 2.4022242e-1f, 5.5507336e-2f, 9.671513e-3f, 1.3264727e-3f};
    static_assert(kDegree == 4 || kDegree == 5);
    const float* c = kDegree == 4 ? c4 : c5;
    Vec p = Vec::all(c[kDegree - 1]);
#pragma GCC unroll 8
    for (int i = kDegree - 2; i >= 0; --i) p = fma(p, r, Vec::all(c[i]));
    return fma(p, r, Vec::all(1.0f));
}

// The float whose bits are those of t times 2**23.
inline Vec low_bits_to_exponent(Vec t) {
#if defined(__AVX512F__)
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t.v), 23))};
#elif defined(__AVX2__)
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t.v), 23))};
#else
    return {(Vec::floats)((Vec::ints)t.v << 23)};
#endif
}

// 2**x for x <= 126, cheaper than exp2; 0 below -126, NaN stays NaN. Adding 1.5 * 2**23 + 127 leaves round(x)
// + 127 in the low bits. Shifted up, they are the exponent of a power of two.
template <int kDegree>
inline Vec exp2_weight(Vec x) {
    const Vec magic = Vec::all(12583039.0f), t = x + magic;
    const Vec y = exp2_near_zero<kDegree>(x - (t - magic)) * low_bits_to_exponent(t);
    return select_less(x, Vec::all(-126.0f), Vec::zero(), y);
}

// `top`, made safe for subtraction: 0 instead of -inf, so that -inf - top stays -inf.
inline Vec finite_top(Vec top) { return select_less(Vec::all(-kInfinity), top, top, Vec::zero()); }

struct MergeWeights {
    float a, b;
    SoftmaxState state;
};

// The merged state, and the factors of the two rows.
inline MergeWeights merge(SoftmaxState a, SoftmaxState b) {
    const float top = a.max > b.max || is_nan(b.max) ? a.max : b.max;
    const float wa = weight(a.max, top), wb = weight(b.max, top);
    return {wa, wb, {top, wa * a.sum + wb * b.sum}};
}

// The merged row. All merges use it, so that the order of roundings is the same.
inline Vec merge_rows(Vec row_a, Vec a, Vec row_b, Vec b) { return fma(row_b, b, row_a * a); }

TTS_END_ISA
