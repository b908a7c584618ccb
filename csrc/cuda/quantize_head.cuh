// Quantises a head of a token's keys or values with one warp, as append_kv_ and rope_append_ store it (format
// and rounding: csrc/include/quantized_kv.h). The head is read once for the range, and again for the codes.
// For e4m3 the nearest bytes are written, without a range.
#pragma once

#include "e4m3.cuh"
#include "kv_numbers.h"
#include "paged_cache.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace tts::cuda {

struct Least {
    __device__ float operator()(float a, float b) const { return fminf(a, b); }
};
struct Greatest {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class T>
__device__ HeadRange range_of(const T* x, int dim) {
    float low = to_float(x[0]), high = low;
    bool finite = true;
    for (int d = lane(); d < dim; d += kWarp) {
        const float v = to_float(x[d]);
        low = fminf(v, low), high = fmaxf(v, high), finite = finite && v - v == 0.0f;
    }
    return {reduce_lanes(low, Least()), reduce_lanes(high, Greatest()), __all_sync(kAllLanes, finite) != 0};
}

// The code of an element, rounded to nearest even; 0 if the scale is 0 or NaN.
struct Encode {
    float scale, zero, low, high;

    template <class T>
    __device__ int operator()(T element) const {
        if (!(scale > 0.0f)) return 0;
        const float x = __fdiv_rn(__fsub_rn(to_float(element), zero), scale);
        return __float2int_rn(fminf(fmaxf(x, low), high));
    }
};

// x [dim] -> `codes`, and entry `index` of the scales and zeros that the format has.
template <class T>
__device__ void quantize_head(const T* x, int dim, KvFormat format, char* codes, KvScales scales,
                              int64_t index) {
    const bool four = format == KvFormat::int4;
    if (format == KvFormat::e4m3) {
        for (int d = lane(); d < dim; d += kWarp) codes[d] = static_cast<char>(to_e4m3(to_float(x[d])));
        return;
    }
    const HeadRange range = range_of(x, dim);
    const float span = four ? __fsub_rn(range.high, range.low) : fmaxf(range.high, -range.low);
    const Affine numbers =
        affine_of(range.finite, from_float<f16>(__fdiv_rn(span, four ? kMostInt4 : kMostInt8)),
                  four ? from_float<f16>(range.low) : f16{0});
    if (lane() == 0) {
        scales.scale[index] = numbers.scale;
        if (four) scales.zero[index] = numbers.zero;
    }
    const Encode encode{to_float(numbers.scale), to_float(numbers.zero), four ? 0.0f : -kMostInt8,
                        four ? kMostInt4 : kMostInt8};
    if (four) {
        const int half = dim / 2;
#pragma unroll 2  // nvcc spills for sm_80 with more, around the calls that a division makes
        for (int d = lane(); d < half; d += kWarp) {
            codes[d] = static_cast<char>(encode(x[d]) | encode(x[half + d]) << 4);
        }
    } else {
#pragma unroll 2
        for (int d = lane(); d < dim; d += kWarp) codes[d] = static_cast<char>(encode(x[d]));
    }
}

}  // namespace tts::cuda
