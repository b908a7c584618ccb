// The state of a softmax that is taken in pieces: what every attention kernel and every merge share.
//
// Over the scores x_j (in units of log2) and values v_j seen so far the state is
//   max = max_j x_j,   sum = sum_j 2**(x_j - max),   acc = sum_j 2**(x_j - max) v_j,
// of which `acc` is a row that the kernel keeps where it likes. The result is acc / sum and the log-sum-exp
// max + log2(sum). Two states merge by scaling both to the larger max: associative, and commutative to the
// bit.
//
// The empty state is (-inf, 0, 0). Its max must never be subtracted from itself (-inf - -inf is NaN), so
// `weight` answers 0 for it; merging with it returns the other state bit for bit (a weight of 1, plus 0).
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

// What a state's sum and row are multiplied by when its max rises to `top`.
inline float weight(float max, float top) {
    return max == top ? 1.0f : max == -kInfinity ? 0.0f : exp2(max - top);
}

// `top` where it can be subtracted: 0 in place of -inf, so that -inf - top stays -inf.
inline Vec finite_top(Vec top) { return select_less(Vec::all(-kInfinity), top, top, Vec::zero()); }

struct MergeWeights {
    float a, b;
    SoftmaxState state;
};

// The merged state, and the factors of the two rows: acc = weight.a * acc_a + weight.b * acc_b.
inline MergeWeights merge(SoftmaxState a, SoftmaxState b) {
    const float top = a.max > b.max || is_nan(b.max) ? a.max : b.max;
    const float wa = weight(a.max, top), wb = weight(b.max, top);
    return {wa, wb, {top, wa * a.sum + wb * b.sum}};
}

TTS_END_ISA
