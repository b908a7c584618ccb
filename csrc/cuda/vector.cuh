// Loads and stores float32, bfloat16 and float16 as float32, 16 bytes at a time if the pointer is aligned.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts::cuda {

__device__ inline float to_float(float x) { return x; }

__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

__device__ inline float to_float(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Rounds to nearest even.
template <class T>
__device__ T from_float(float x) {
    if constexpr (sizeof(T) == 4) {
        return x;
    } else {
        T y;
        if constexpr (__is_same(T, bf16)) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        if constexpr (__is_same(T, f16)) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        return y;
    }
}

// Element i of an array whose type is known only at run time.
__device__ inline float load(FloatArray a, int64_t i) {
    if (a.dtype == DType::f32) return static_cast<const float*>(a.data)[i];
    if (a.dtype == DType::bf16) return to_float(static_cast<const bf16*>(a.data)[i]);
    return to_float(static_cast<const f16*>(a.data)[i]);
}

// Whether rows at a distance of `bytes` can be read kUnit bytes at a time.
template <int kUnit = 16>
bool aligned(const void* p, int64_t bytes = 0) {
    return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(bytes)) % kUnit == 0;
}

// The two elements of a word, the one with the lower address first.
template <class T>
__device__ void unpack(uint32_t word, float& a, float& b) {
    a = to_float(T{static_cast<uint16_t>(word)});
    b = to_float(T{static_cast<uint16_t>(word >> 16)});
}

// N elements from an address that is a multiple of 16.
template <class T, int N>
__device__ void load(const T* p, float (&x)[N]) {
    constexpr int kEach = 16 / sizeof(T);
    static_assert(N % kEach == 0);
#pragma unroll
    for (int i = 0; i < N; i += kEach) {
        const uint4 v = *reinterpret_cast<const uint4*>(p + i);
        if constexpr (sizeof(T) == 4) {
            x[i] = __uint_as_float(v.x), x[i + 1] = __uint_as_float(v.y);
            x[i + 2] = __uint_as_float(v.z), x[i + 3] = __uint_as_float(v.w);
        } else {
            unpack<T>(v.x, x[i], x[i + 1]), unpack<T>(v.y, x[i + 2], x[i + 3]);
            unpack<T>(v.z, x[i + 4], x[i + 5]), unpack<T>(v.w, x[i + 6], x[i + 7]);
        }
    }
}

template <class T>
__device__ uint32_t pack(float a, float b) {
    return from_float<T>(a).bits | static_cast<uint32_t>(from_float<T>(b).bits) << 16;
}

// N elements to an address that is a multiple of 16.
template <class T, int N>
__device__ void store(T* p, const float (&x)[N]) {
    constexpr int kEach = 16 / sizeof(T);
    static_assert(N % kEach == 0);
#pragma unroll
    for (int i = 0; i < N; i += kEach) {
        uint4 v;
        if constexpr (sizeof(T) == 4) {
            v = {__float_as_uint(x[i]), __float_as_uint(x[i + 1]), __float_as_uint(x[i + 2]),
                 __float_as_uint(x[i + 3])};
        } else {
            v = {pack<T>(x[i], x[i + 1]), pack<T>(x[i + 2], x[i + 3]), pack<T>(x[i + 4], x[i + 5]),
                 pack<T>(x[i + 6], x[i + 7])};
        }
        *reinterpret_cast<uint4*>(p + i) = v;
    }
}

}  // namespace tts::cuda
