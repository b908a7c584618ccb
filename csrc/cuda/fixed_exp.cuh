// The formula of csrc/include/fixed_exp.h for one float. It gives the same weights as on the CPU, to the bit.
#pragma once

#include <cstdint>

#include "fixed_exp.h"

namespace tts::cuda {

struct FixedExp : FixedExpConstants {
    using FixedExpConstants::FixedExpConstants;

    // The weight of x <= 0, not yet rounded to a whole number.
    __device__ float operator()(float x) const {
        x = x > lowest ? x : lowest;
        const float shifted = __fmaf_rn(x, scale, magic);
        const float f = __fmaf_rn(x, scale, __fsub_rn(magic, shifted));
        float p = c5;
        p = __fmaf_rn(p, f, c4);
        p = __fmaf_rn(p, f, c3);
        p = __fmaf_rn(p, f, c2);
        p = __fmaf_rn(p, f, c1);
        p = __fmaf_rn(p, f, c0);
        return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
    }

    __device__ uint64_t weight(float x) const { return __float2ull_rn((*this)(x)); }
};

}  // namespace tts::cuda
