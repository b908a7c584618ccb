// The scale and zero of a quantised head of keys or values, computed in the same way by CPU and GPU
// (quantized_kv.h).
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

TTS_BEGIN_ISA

// The largest codes: 8 bits with a sign, 4 bits without.
inline constexpr float kMostInt8 = 127.0f, kMostInt4 = 15.0f;

// -0.0 becomes 0.0, so that the result does not depend on which of them is the smallest element.
TTS_HD inline f16 unsigned_zero(f16 x) { return (x.bits & 0x7fffu) == 0 ? f16{0} : x; }

TTS_HD inline bool is_finite(f16 x) { return (x.bits & 0x7c00u) != 0x7c00u; }

// The range of a head's elements.
struct HeadRange {
    float low, high;
    bool finite;
};

struct Affine {
    f16 scale, zero;
};

// Scale and zero of a head from arithmetic rounded to float16. `finite`: whether all elements are finite.
TTS_HD inline Affine affine_of(bool finite, f16 scale, f16 zero) {
    constexpr uint16_t kNaN = 0x7e00u;
    if (!finite) return {{kNaN}, {kNaN}};
    scale = unsigned_zero(scale), zero = unsigned_zero(zero);
    return {is_finite(scale) && is_finite(zero) ? scale : f16{kNaN}, zero};
}

TTS_END_ISA
