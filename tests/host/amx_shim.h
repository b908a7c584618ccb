// AMX tiles in software, in the place of the intrinsics; included before the sources of that level where a
// sanitizer is at work, which sees each byte that a tile reads or writes then, on a processor with AMX or
// without it. test_amx_shim.cpp compares it with the instructions, bit by bit.
//
// The operations are those of Intel's manual (Software Developer's Manual, volume 2, TDPBF16PS and TDPBSUD).
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace amx_shim {

struct Tile {
    uint8_t rows[16][64];
};

struct State {
    uint8_t config[64];
    Tile tiles[8];

    int rows(int t) const { return config[48 + t]; }
    int bytes(int t) const { return config[16 + 2 * t] | config[17 + 2 * t] << 8; }
};

inline State& state() {
    static thread_local State state;
    return state;
}

inline void load_config(const void* config) {
    State& s = state();
    std::memset(&s, 0, sizeof s);
    std::memcpy(s.config, config, sizeof s.config);
}

inline void release() { std::memset(&state(), 0, sizeof(State)); }

inline void zero(int t) { std::memset(&state().tiles[t], 0, sizeof(Tile)); }

inline void load(int t, const void* base, int64_t stride) {
    State& s = state();
    zero(t);
    for (int r = 0; r < s.rows(t); ++r) {
        std::memcpy(s.tiles[t].rows[r], static_cast<const char*>(base) + r * stride,
                    static_cast<uint64_t>(s.bytes(t)));
    }
}

inline void store(int t, void* base, int64_t stride) {
    const State& s = state();
    for (int r = 0; r < s.rows(t); ++r) {
        std::memcpy(static_cast<char*>(base) + r * stride, s.tiles[t].rows[r],
                    static_cast<uint64_t>(s.bytes(t)));
    }
}

// A subnormal number counts as zero, as an operand and as a result.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

inline float bfloat16(const uint8_t* from) {
    const uint32_t bits = static_cast<uint32_t>(from[0] | from[1] << 8) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return flushed(x);
}

// Sums over even and over odd elements, which then meet and are added.
inline void add_bfloat16(int to, int a, int b) {
    State& s = state();
    for (int m = 0; m < s.rows(to); ++m) {
        for (int n = 0; n < s.bytes(to) / 4; ++n) {
            float sums[2] = {0.0f, 0.0f};
            for (int k = 0; k < s.bytes(a) / 4; ++k) {
                for (int i = 0; i < 2; ++i) {
                    const float x = bfloat16(s.tiles[a].rows[m] + 4 * k + 2 * i);
                    const float y = bfloat16(s.tiles[b].rows[k] + 4 * n + 2 * i);
                    sums[i] = flushed(std::fma(x, y, sums[i]));
                }
            }
            float sum;
            uint8_t* at = s.tiles[to].rows[m] + 4 * n;
            std::memcpy(&sum, at, sizeof sum);
            sum = flushed(flushed(sum) + flushed(sums[0] + sums[1]));
            std::memcpy(at, &sum, sizeof sum);
        }
    }
}

// Signed bytes times unsigned ones, added to 32 bits, which wrap.
inline void add_bytes(int to, int a, int b) {
    State& s = state();
    for (int m = 0; m < s.rows(to); ++m) {
        for (int n = 0; n < s.bytes(to) / 4; ++n) {
            uint32_t sum;
            uint8_t* at = s.tiles[to].rows[m] + 4 * n;
            std::memcpy(&sum, at, sizeof sum);
            for (int k = 0; k < s.bytes(a); ++k) {
                const int x = static_cast<int8_t>(s.tiles[a].rows[m][k]),
                          y = s.tiles[b].rows[k / 4][4 * n + k % 4];
                sum += static_cast<uint32_t>(x * y);
            }
            std::memcpy(at, &sum, sizeof sum);
        }
    }
}

}  // namespace amx_shim
