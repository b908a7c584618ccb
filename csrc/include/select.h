// Weighted selection: the logit at which the measure of all larger ones reaches a target, without sorting.
#pragma once

#include <cstdint>

#include "isa.h"
#include "vec.h"

namespace tts {

struct Selected {
    bool found;
    float value;     // the largest whose measure, with that of all above it, reaches the target
    uint64_t above;  // the measure of all above it
};

}  // namespace tts

TTS_BEGIN_ISA

// Floats in ascending order as unsigned numbers; -0.0 as 0.0.
inline uint32_t order(float x) {
    const uint32_t bits = float_bits(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline float from_order(uint32_t key) { return bit_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// Among x [n], all in [low, high]. An element measures its weight, or 1 where `weights` is null.
// Radix selection from the top down: a histogram over the leading bits of the keys' range, then over the
// range of the one bin that the target falls into, at most four times. Overwrites x and weights. O(n).
inline Selected select(float* x, uint64_t* weights, int64_t n, float low, float high, uint64_t target) {
    constexpr uint32_t kBins = 1024;
    uint32_t first = order(low), span = order(high) - first;
    uint64_t above = 0;
    for (;;) {
        int shift = 0;
        while ((span >> shift) >= kBins) ++shift;
        uint64_t bins[kBins] = {};
        for (int64_t i = 0; i < n; ++i) bins[(order(x[i]) - first) >> shift] += weights ? weights[i] : 1;

        uint32_t bin = span >> shift;
        while (above + bins[bin] < target) {
            above += bins[bin];
            if (bin-- == 0) return {false, 0.0f, above};
        }
        first += bin << shift;
        if (shift == 0) return {true, from_order(first), above};

        const uint32_t width = (uint32_t{1} << shift) - 1, rest = span - (bin << shift);
        span = width < rest ? width : rest;
        int64_t kept = 0;
        for (int64_t i = 0; i < n; ++i) {
            if (order(x[i]) - first > span) continue;
            x[kept] = x[i];
            if (weights) weights[kept] = weights[i];
            ++kept;
        }
        n = kept;
    }
}

TTS_END_ISA
