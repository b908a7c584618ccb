// The score of one step, computed by one block.
//
// A one-row head computes act(w . norm(x) + b). RMSNorm needs no extra pass: w . (x g / rms) = (w g . x) /
// rms, and the squares are summed in the same loop. For a head with a hidden layer, the partial sums of the
// blocks of hidden units are added.
#pragma once

#include "integers.h"
#include "reduce.cuh"
#include "step_scores.h"
#include "vector.cuh"

namespace tts::cuda {

__device__ inline float activate(float z, bool sigmoid) { return sigmoid ? 1.0f / (1.0f + expf(-z)) : z; }

__device__ inline float bias(const HeadArgs& head) { return head.bias ? *head.bias : 0.0f; }

__device__ inline float inverse_rms(float squares, int64_t width, float eps) {
    return 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
}

struct ScoreSums {  // w g . x and x . x
    float dot, squares;
};

// The sums of one of kThreads threads: eight neighbours at a time, then the last few one by one.
template <int kThreads, class T>
__device__ ScoreSums score_sums(const T* x, const HeadArgs& head, int64_t width, bool vectors) {
    constexpr int kEach = 8;
    const bool normed = head.norm_weight.data != nullptr;
    ScoreSums sums{0.0f, 0.0f};
    const auto add = [&](float v, float w, float g) {
        sums.dot = fmaf(v * g, w, sums.dot);
        sums.squares = fmaf(v, v, sums.squares);
    };
    const int64_t whole = vectors ? width / kEach * kEach : 0;
    for (int64_t i = threadIdx.x * kEach; i < whole; i += kThreads * kEach) {
        float v[kEach], w[kEach];
        load(x + i, v);
        load(head.weight + i, w);
#pragma unroll
        for (int j = 0; j < kEach; ++j) add(v[j], w[j], normed ? load(head.norm_weight, i + j) : 1.0f);
    }
    for (int64_t i = whole + threadIdx.x; i < width; i += kThreads) {
        add(to_float(x[i]), head.weight[i], normed ? load(head.norm_weight, i) : 1.0f);
    }
    return sums;
}

// Both functions are parts of a kernel with kThreads threads in a block. Every thread gets the score of step
// s.

// `vectors`: rows and weight can be read 16 bytes at a time.
template <class T>
struct OneRow {
    template <int kThreads>
    __device__ static float score(const StepScoresArgs& args, int64_t s, bool vectors) {
        __shared__ float scratch[2][kThreads / kWarp];
        const T* x = static_cast<const T*>(args.hidden.data) + at(args.positions, s) * args.stride;
        ScoreSums sums = score_sums<kThreads>(x, args.head, args.width, vectors);
        sums.dot = reduce_block<kThreads>(sums.dot, scratch[0], Add{});
        if (args.head.norm_weight.data) {
            sums.squares = reduce_block<kThreads>(sums.squares, scratch[1], Add{});
            sums.dot *= inverse_rms(sums.squares, args.width, args.head.eps);
        }
        return activate(sums.dot + bias(args.head), args.head.sigmoid);
    }
};

struct HiddenLayer {
    template <int kThreads>
    __device__ static float score(const StepScoresArgs& args, int64_t s, bool) {
        __shared__ float scratch[kThreads / kWarp];
        const int64_t blocks = divide_up(args.head.hidden_width, kHiddenUnits);
        float sum = 0.0f;
        for (int64_t b = threadIdx.x; b < blocks; b += kThreads) sum += args.partials[b * args.steps + s];
        sum = reduce_block<kThreads>(sum, scratch, Add{});
        return activate(sum + bias(args.head), args.head.sigmoid);
    }
};

inline bool reads_vectors(const StepScoresArgs& args) {
    return aligned(args.hidden.data, args.stride * (args.hidden.dtype == DType::f32 ? 4 : 2)) &&
           aligned(args.head.weight);
}

// Calls f with the kind of head as a type.
template <class F>
void dispatch_head(const StepScoresArgs& args, F f) {
    if (args.head.w1.data) return f(HiddenLayer{});
    dispatch(args.hidden.dtype, [&](auto* type) { f(OneRow<std::remove_pointer_t<decltype(type)>>{}); });
}

}  // namespace tts::cuda
