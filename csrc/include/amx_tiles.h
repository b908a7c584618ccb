// The tile registers of a thread: 0 to 3 hold sums, 4 and 5 rows of X, 6 and 7 weights.
//
// A tile is 16 lines of up to 64 bytes. The product of a tile of rows [16][64 bytes] and a tile of weights
// [16 steps][16 outputs][4 bytes] is added to [16 rows][16 outputs] sums. Panels of weights in memory already
// have the layout of such tiles. The compiler does not know that the intrinsics read memory, so `fence` is
// needed after the code that writes this memory.
#pragma once

#include <cstdint>

#include "isa.h"

#if defined(__AMX_TILE__)
#include <immintrin.h>

TTS_BEGIN_ISA

inline constexpr int64_t kTileLines = 16, kTileLine = 64, kTileBytes = kTileLines * kTileLine;

struct BFloat16Product {};  // pairs of bfloat16, sums in float32
struct IntProduct {};       // signed rows, unsigned weights of 8 bits

inline void fence() { __asm__ volatile("" ::: "memory"); }

// Configures the thread's tiles for products of `steps` steps, and releases them at the end.
class AmxTiles {
  public:
    explicit AmxTiles(int64_t steps) {
        alignas(64) uint8_t config[64] = {/* palette */ 1};
        for (int t = 0; t < 8; ++t) {
            const bool is_rows = t == 4 || t == 5, is_weights = t > 5;
            config[16 + 2 * t] = static_cast<uint8_t>(is_rows ? 4 * steps : kTileLine);
            config[48 + t] = static_cast<uint8_t>(is_weights ? steps : kTileLines);
        }
        fence();
        _tile_loadconfig(config);
    }
    ~AmxTiles() { _tile_release(); }
    AmxTiles(const AmxTiles&) = delete;
    AmxTiles& operator=(const AmxTiles&) = delete;
};

// Four tiles of sums: for 16 rows and 4 panels, 32 rows and 2 panels, or 64 rows and one panel.
inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Stores them as sums [R][P][16] of 32 bits.
template <int R>
inline void store_sums(void* sums) {
    auto* out = static_cast<char*>(sums);
    constexpr int64_t P = 64 / R, row = P * kTileLine;
    const auto at = [&](int64_t tile) { return out + tile / P * 16 * row + tile % P * kTileLine; };
    _tile_stored(0, at(0), row);
    _tile_stored(1, at(1), row);
    _tile_stored(2, at(2), row);
    _tile_stored(3, at(3), row);
}

// Adds the product of rows A and the weights of their panel to sums S. The registers of an intrinsic are
// literals.
template <int S, int A>
inline void add_product(BFloat16Product) {
    if constexpr (S == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (S == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (S == 2 && A == 4) _tile_dpbf16ps(2, 4, 6);
    if constexpr (S == 3 && A == 4) _tile_dpbf16ps(3, 4, 7);
    if constexpr (S == 2 && A == 5) _tile_dpbf16ps(2, 5, 6);
    if constexpr (S == 3 && A == 5) _tile_dpbf16ps(3, 5, 7);
}

template <int S, int A>
inline void add_product(IntProduct) {
    if constexpr (S == 0) _tile_dpbsud(0, 4, 6);
    if constexpr (S == 1) _tile_dpbsud(1, 4, 7);
    if constexpr (S == 2 && A == 4) _tile_dpbsud(2, 4, 6);
    if constexpr (S == 3 && A == 4) _tile_dpbsud(3, 4, 7);
    if constexpr (S == 2 && A == 5) _tile_dpbsud(2, 5, 6);
    if constexpr (S == 3 && A == 5) _tile_dpbsud(3, 5, 7);
}

// Adds the products of R rows (in tiles of 16, at a distance of `apart` bytes) and the panels whose weights
// are at `part(p)`, with `stride` bytes from step to step.
template <class Product, int R, class F>
inline void add_products(const void* rows, int64_t apart, F part, int64_t stride = kTileLine) {
    const auto* tile = static_cast<const char*>(rows);
    _tile_loadd(4, tile, kTileLine);
    _tile_loadd(6, part(0), stride);
    if constexpr (R == 16) {
        add_product<0, 4>(Product{});
        _tile_loadd(7, part(1), stride);
        add_product<1, 4>(Product{});
        _tile_loadd(6, part(2), stride);
        add_product<2, 4>(Product{});
        _tile_loadd(7, part(3), stride);
        add_product<3, 4>(Product{});
    } else if constexpr (R == 32) {
        _tile_loadd(5, tile + apart, kTileLine);
        add_product<0, 4>(Product{});
        add_product<2, 5>(Product{});
        _tile_loadd(7, part(1), stride);
        add_product<1, 4>(Product{});
        add_product<3, 5>(Product{});
    } else {
        _tile_loadd(5, tile + apart, kTileLine);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(4, tile + 2 * apart, kTileLine);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(5, tile + 3 * apart, kTileLine);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
    }
}

TTS_END_ISA
#endif
