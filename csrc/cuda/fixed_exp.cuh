// The twin of csrc/include/fixed_exp.h for one float: the same weights, to the bit.
#pragma once

#include <cstdint>

#include "bits.h"

namespace tts::cuda {

inline constexpr int kWeightBits = 39;  // the weight of the largest logit is 2**39

struct FixedExp {
    float scale, lowest;

    // T > 0.
    __device__ explicit FixedExp(float temperature) {
        const double wanted = 1.4426950408889634 / static_cast<double>(temperature);
        scale = static_cast<float>(wanted < 0x1p-100 ? 0x1p-100 : wanted > 0x1p100 ? 0x1p100 : wanted);
        lowest = static_cast<float>(-42.0 / static_cast<double>(scale));
    }

    // The weight of x <= 0, yet to be rounded to a whole number.
    __device__ float operator()(float x) const {
        constexpr float kMagic = 12582912.0f;
        x = x > lowest ? x : lowest;
        const float shifted = __fmaf_rn(x, scale, kMagic);
        const float f = __fmaf_rn(x, scale, __fsub_rn(kMagic, shifted));
        float p = 0x1.5bba14p+29f;
        p = __fmaf_rn(p, f, 0x1.3cea88p+32f);
        p = __fmaf_rn(p, f, 0x1.c6b752p+34f);
        p = __fmaf_rn(p, f, 0x1.ebf9bcp+36f);
        p = __fmaf_rn(p, f, 0x1.62e42ap+38f);
        p = __fmaf_rn(p, f, 0x1p+39f);
        return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
    }

    __device__ uint64_t weight(float x) const { return __float2ull_rn((*this)(x)); }
};

}  // namespace tts::cuda
