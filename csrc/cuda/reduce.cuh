// Reductions over a warp and over a block. The order is always the same.
#pragma once

#include <cstdint>

namespace tts::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

struct Add {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};

struct Max {  // of floats: the other one where either is NaN
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a > b || b != b ? a : b;
    }
};

// Every lane gets the result over its group of kLanes neighbours; kLanes is a power of two.
template <int kLanes = kWarp, class T, class F>
__device__ T reduce_lanes(T x, F f) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x = f(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
}

// Every thread of a block of kThreads gets the result. `scratch` [kThreads / kWarp] is in shared memory. It
// may be reused at once, because there is a barrier before and after it is written.
template <int kThreads, class T, class F>
__device__ T reduce_block(T x, T* scratch, F f) {
    constexpr int kWarps = kThreads / kWarp;
    x = reduce_lanes(x, f);
    if constexpr (kWarps == 1) return x;
    __syncthreads();
    if (lane() == 0) scratch[warp()] = x;
    __syncthreads();
    x = scratch[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) x = f(x, scratch[i]);
    return x;
}

}  // namespace tts::cuda
