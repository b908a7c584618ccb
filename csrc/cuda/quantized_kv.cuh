// Decodes heads of keys and values: the counterpart of csrc/include/quantized_kv.h, which describes the
// formats. An element is code * scale + zero, rounded once, and then rounded to the type of the queries.
// (int8 has no zero: adding 0 changes no bit, because with a scale of 0 all codes are 0.) Bytes of e4m3 are
// handled as codes, too, without a scale.
#pragma once

#include "e4m3.cuh"
#include "paged_cache.h"
#include "vector.cuh"

namespace tts::cuda {

__device__ inline int64_t code_bytes(KvFormat format, int64_t head_dim) {
    return format == KvFormat::int4 ? head_dim / 2 : head_dim;
}

struct KvNumbers {
    float scale, zero;

    __device__ float operator()(float code) const { return fmaf(code, scale, zero); }
};

// Element d of a head with `dim` elements.
template <class T>
__device__ float element(const uint8_t* codes, int d, int dim, KvFormat format, KvNumbers numbers) {
    if (format == KvFormat::e4m3) return to_float(from_float<T>(of_e4m3(uint32_t{codes[d]} << 24)));
    int code;
    if (format == KvFormat::int8) {
        code = static_cast<int8_t>(codes[d]);
    } else {
        const int half = dim / 2;
        code = d < half ? codes[d] & 15 : codes[d - half] >> 4;
    }
    return to_float(from_float<T>(numbers(static_cast<float>(code))));
}

// The codes of elements d to d + 7 as bytes. d and the size of the head are multiples of 8.
__device__ inline uint2 eight_codes(const uint8_t* codes, int d, int dim, KvFormat format) {
    if (format != KvFormat::int4) return *reinterpret_cast<const uint2*>(codes + d);
    const int half = dim / 2;  // a multiple of 4
    const auto four = [&](int e) {
        const uint32_t pairs = *reinterpret_cast<const uint32_t*>(codes + (e < half ? e : e - half));
        return (e < half ? pairs : pairs >> 4) & 0x0f0f0f0fu;
    };
    return {four(d), four(d + 4)};
}

// The elements of four codes. A code is placed as the last byte of the float 2**23 + code, for int8 of 2**23
// + 128 + code. This avoids conversions, which a GPU executes at a quarter of the rate of additions.
template <class T>
__device__ uint2 four_elements(uint32_t codes, KvFormat format, KvNumbers numbers) {
    float x[4];
    if (format == KvFormat::e4m3) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = of_e4m3(__byte_perm(codes, 0, 0x0444u + (i << 12)));
        return {pack<T>(x[0], x[1]), pack<T>(x[2], x[3])};
    }
    const bool with_sign = format == KvFormat::int8;
    const float base = with_sign ? 0x1p23f + 128.0f : 0x1p23f;
    if (with_sign) codes ^= 0x80808080u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[i] = numbers(__uint_as_float(__byte_perm(codes, 0x4b000000u, 0x7440u + i)) - base);
    }
    return {pack<T>(x[0], x[1]), pack<T>(x[2], x[3])};
}

}  // namespace tts::cuda
