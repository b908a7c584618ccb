// Prefetches to L2 the weights that a thread will need next, while it computes.
#pragma once

#include <cstdint>

#include "integers.h"
#include "isa.h"

TTS_BEGIN_ISA

// With so few rows, a thread waits for memory, which hardware prefetching keeps busy: then nothing is fetched
// here.
inline constexpr int64_t kFewRows = 4;

// Memory to fetch while a tile computes: `stride` bytes per step, from `begin` on. It goes to L2, because L1
// holds the data that the tile reads. Hardware prefetching alone reaches at most half of the memory's rate.
struct Ahead {
    const char* begin;
    int64_t stride;

    // The share of pass number `pass` of `passes`, of `line` bytes per step.
    static Ahead share(const void* from, int64_t line, int64_t steps, int64_t pass, int64_t passes) {
        const int64_t each = divide_up(line, passes);
        return {static_cast<const char*>(from) + pass * each * steps, each};
    }

    void fetch(int64_t step) const {
        constexpr int64_t kLine = 64;
        for (int64_t at = 0; at < stride; at += kLine) {
            __builtin_prefetch(begin + step * stride + at, 0, /* locality */ 2);
        }
    }
};

TTS_END_ISA
