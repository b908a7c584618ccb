// Weights that a thread will take next, on their way to L2 while it computes.
#pragma once

#include <cstdint>

#include "integers.h"
#include "isa.h"

TTS_BEGIN_ISA

// So few rows wait for memory, which the hardware's prefetching keeps busy: they fetch nothing themselves.
inline constexpr int64_t kFewRows = 4;

// Memory to be fetched while a tile computes: `stride` bytes per step, from `begin` on. It goes to L2, since
// L1 holds what the tile reads, and hardware prefetching alone keeps no more than half of the memory's rate.
struct Ahead {
    const char* begin;
    int64_t stride;

    // Pass number `pass` of `passes` takes its share of `line` bytes per step.
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
