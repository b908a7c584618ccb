// The state of a softmax that is computed in pieces: the counterpart of csrc/include/online_softmax.h, which
// explains it.
#pragma once

#include "reduce.cuh"

namespace tts::cuda {

inline constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// 2**x within 2 units in the last place; 0 below -126.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x within one unit in the last place; 0 from 2**126.
__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

struct SoftmaxState {
    float max = -infinity(), sum = 0.0f;  // max in units of log2

    __device__ bool empty() const { return max == -infinity() && sum == 0.0f; }
    // The log-sum-exp, natural.
    __device__ float lse() const { return empty() ? -infinity() : (max + log2f(sum)) * kLn2; }
};

// The factor of a state's sum and row when its max rises to `top`.
__device__ inline float weight(float max, float top) {
    return max == top ? 1.0f : max == -infinity() ? 0.0f : exp2_fast(max - top);
}

// For two states of one row, `a` before `b`: the merged state, and the factors of their sums of weighted
// values. Merging with the empty state changes no bit.
struct Merge {
    float a, b;
    SoftmaxState state;
    bool only_a, only_b;

    __device__ Merge(SoftmaxState x, SoftmaxState y) : only_a(y.empty()), only_b(x.empty()) {
        const float top = fmaxf(x.max, y.max);
        a = weight(x.max, top), b = weight(y.max, top);
        state = only_a ? x : only_b ? y : SoftmaxState{top, fmaf(b, y.sum, __fmul_rn(a, x.sum))};
        if (only_a) a = 1.0f;
        if (only_b) b = 1.0f;
    }

    __device__ float operator()(float x, float y) const {
        return only_a ? x : only_b ? y : fmaf(y, b, __fmul_rn(x, a));
    }
};

// `top`, made safe for subtraction: 0 instead of -inf, so that -inf - top stays -inf.
__device__ inline float finite_top(float top) { return top == -infinity() ? 0.0f : top; }

}  // namespace tts::cuda
