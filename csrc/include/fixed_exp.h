// exp as an integer: weight(x) = round(2**39 exp(x / T)) for x <= 0, the same bits on every machine.
//
// Sampling compares sums of weights with a random number. Sums of integers do not depend on the order, so
// threads, vector widths and GPU grids do not change the result. The float32 arithmetic below has a unique
// result if subtraction, fused multiply-add and conversion round to nearest even:
//
//   scale = float32(log2(e) / T)          in float64, clamped to [2**-100, 2**100]
//   z     = scale * max(x, -42 / scale)   not rounded: only used inside the fused operations
//   n     = fma(.., .., 1.5 * 2**23) - 1.5 * 2**23            nearest whole number to z
//   f     = fma(.., .., -n)                                   |f| <= 1/2
//   p     = 1 + f (c1 + f (c2 + f (c3 + f (c4 + f c5))))      2**f within 1.7e-7: Horner, every step fused
//   weight = round to nearest even of 2**(n + 39) p           0 where exp(x / T) <= 2**-40
//
// A weight is at most 2**39, so 2**24 of them fit in a uint64.
#pragma once

#include <cstdint>

#include "isa.h"

TTS_BEGIN_ISA

inline constexpr int kWeightBits = 39;  // the weight of the largest logit is 2**39
inline constexpr uint64_t kOne = uint64_t{1} << kWeightBits;

// The constants of one temperature, and those common to all. Implementations of the formula derive from it:
// csrc/cpu for vectors (vec_fixed_exp.h), csrc/cuda for a float (fixed_exp.cuh).
struct FixedExpConstants {
    float scale;   // log2(e) / T
    float lowest;  // below it the weight is 0

    // T > 0. The clamp keeps `lowest` finite and far from subnormal numbers. It means that all temperatures
    // below 8e-31 have the same effect, and so have all above 1.8e30.
    TTS_HD explicit FixedExpConstants(float temperature) {
        const double wanted = 1.4426950408889634 / static_cast<double>(temperature);
        scale = static_cast<float>(wanted < 0x1p-100 ? 0x1p-100 : wanted > 0x1p100 ? 0x1p100 : wanted);
        lowest = static_cast<float>(-42.0 / static_cast<double>(scale));
    }

    static constexpr float magic = 0x1.8p23f;
    // The coefficients times 2**39.
    static constexpr float c0 = 0x1p+39f, c1 = 0x1.62e42ap+38f, c2 = 0x1.ebf9bcp+36f, c3 = 0x1.c6b752p+34f,
                           c4 = 0x1.3cea88p+32f, c5 = 0x1.5bba14p+29f;
};

TTS_END_ISA
