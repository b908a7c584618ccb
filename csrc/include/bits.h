// Floats and their bits.
#pragma once

#include <cstdint>

#include "isa.h"

TTS_BEGIN_ISA

TTS_HD inline float bit_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

TTS_HD inline uint32_t float_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline constexpr float kInfinity = __builtin_inff();

TTS_HD inline bool is_nan(float x) { return x != x; }

TTS_END_ISA
