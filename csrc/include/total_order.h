// The order in which candidates are kept: higher score first; NaN after -inf; -0.0 equal to 0.0.
//
// A score becomes a signed integer key, greater for a better score, so that keys can simply be compared. Ties
// go to the lower index: `ranked` combines a key and an index (in the low half) into one 64-bit number, so
// that no two are equal.
#pragma once

#include <cstdint>

#include "bits.h"
#include "isa.h"

TTS_BEGIN_ISA

inline constexpr int32_t kNaNKey = INT32_MIN;  // -inf has INT32_MIN + 0x007fffff

// Floats order like their bits if positive, in reverse if negative; adding 0.0 turns -0.0 into 0.0.
TTS_HD inline int32_t order_key(float score) {
    const auto bits = static_cast<int32_t>(float_bits(score + 0.0f));
    return is_nan(score) ? kNaNKey : bits ^ ((bits >> 31) & INT32_MAX);
}

// The float of a key; NaN for keys outside the infinities.
TTS_HD inline float key_score(int32_t key) {
    return bit_float(static_cast<uint32_t>(key ^ ((key >> 31) & INT32_MAX)));
}

// A key and an index below 2**32 as one number. A better pair is greater, and no two are equal.
TTS_HD inline int64_t ranked(int32_t key, uint32_t index) {
    return int64_t{key} * (int64_t{1} << 32) | ~index;
}

TTS_HD inline int32_t ranked_key(int64_t rank) { return static_cast<int32_t>(rank >> 32); }

TTS_HD inline uint32_t ranked_index(int64_t rank) { return ~static_cast<uint32_t>(rank); }

TTS_END_ISA
