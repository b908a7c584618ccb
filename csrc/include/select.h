// Weighted selection without sorting: finds the logit at which the measure of all larger ones reaches a
// target.
#pragma once

#include <cstdint>

#include "isa.h"
#include "total_order.h"

namespace tts {

struct Selected {
    bool found;
    float value;     // the largest value for which it and all above it have a measure that reaches the target
    uint64_t above;  // the measure of all values above it
};

}  // namespace tts

TTS_BEGIN_ISA

// Keys of the total order, counted from `first`, the key of the smallest.
inline uint32_t key_above(float x, int32_t first) {
    return static_cast<uint32_t>(order_key(x)) - static_cast<uint32_t>(first);
}

// Selects among x [n], all in [low, high]. The measure of an element is its weight, or 1 if `weights` is
// null. This is a radix selection from the top down: a histogram over the leading bits of the keys' range,
// then over the range of the bin that contains the target, at most four times. Overwrites x and weights.
// O(n).
inline Selected select(float* x, uint64_t* weights, int64_t n, float low, float high, uint64_t target) {
    constexpr uint32_t kBins = 1024;
    int32_t first = order_key(low);
    uint32_t span = key_above(high, first);
    uint64_t above = 0;
    for (;;) {
        int shift = 0;
        while ((span >> shift) >= kBins) ++shift;
        uint64_t bins[kBins] = {};
        for (int64_t i = 0; i < n; ++i) bins[key_above(x[i], first) >> shift] += weights ? weights[i] : 1;

        uint32_t bin = span >> shift;
        while (above + bins[bin] < target) {
            above += bins[bin];
            if (bin-- == 0) return {false, 0.0f, above};
        }
        first = static_cast<int32_t>(static_cast<uint32_t>(first) + (bin << shift));
        if (shift == 0) return {true, key_score(first), above};

        const uint32_t width = (uint32_t{1} << shift) - 1, rest = span - (bin << shift);
        span = width < rest ? width : rest;
        int64_t kept = 0;
        for (int64_t i = 0; i < n; ++i) {
            if (key_above(x[i], first) > span) continue;
            x[kept] = x[i];
            if (weights) weights[kept] = weights[i];
            ++kept;
        }
        n = kept;
    }
}

TTS_END_ISA
