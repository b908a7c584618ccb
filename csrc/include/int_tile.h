// Register tiles of the product X W^T of whole numbers: X has 8 bits, except for a few numbers of 15 bits, W
// has 8 or 4 bits, and exact sums have 32 bits.
//
//   rows     R <= kIntRows rows of X, signed, in blocks of 64 along the depth, in the tile's own order
//   weights  panels of 16 rows of W, unsigned: [steps][16][4], a step being 4 elements of the depth. In 4
//            bits [steps / 2][16][4]: an even step is in the low halves of the bytes, an odd one in the high.
//
// The layout of the weights is the same for every instruction set, that of the rows is not. Sums are exact,
// so they are the same for every instruction set, in any order.
//
// A vector of weights is one step of 16 outputs. `vpdpbusd` multiplies it by a broadcast word of a row: its
// operands are unsigned and signed. Without VNNI, AVX-512 and plain C++ use weights and rows of 16 bits
// (`vpmaddwd`), and AVX2 moves the signs of the weights to the rows, so that `vpmaddubsw` cannot saturate.
// AMX uses 16 steps of a panel as a tile, directly from memory.
//
// A number above 127 does not fit in 8 bits. It is split into low + 128 high. The low part is stored at its
// place among the others. The high parts of a row are a short list of steps, whose products are added later.
#pragma once

#include <cstdint>

#include "ahead.h"
#include "amx_tiles.h"
#include "args/linear_quantized.h"
#include "int_vec.h"
#include "isa.h"

namespace tts {

inline constexpr int64_t kIntPanel = 16;  // rows of W in a panel
inline constexpr int64_t kIntStep = 4;    // elements of the depth in a step
inline constexpr int64_t kIntBlock = 64;  // the depth is padded to its multiples: the depth of an AMX tile
inline constexpr int64_t kIntGroup = 32;  // the smallest group of columns with one scale

// Up to this depth no 32-bit sum overflows: a row's numbers are at most 127 on average, weights at most 255.
inline constexpr int64_t kIntDepth = 1 << 16;
inline constexpr float kIntTop = 127.0f;      // the largest number of 8 bits
inline constexpr float kIntOutlier = 128.0f;  // this times it is the largest number of all

}  // namespace tts

TTS_BEGIN_ISA

// Number of bytes in a panel's step.
template <int Bits>
inline constexpr int64_t kIntLine = kIntPanel * kIntStep * Bits / 8;

// The sums of a panel's outputs, in order.
struct PanelSums {
    static constexpr int count = kIntPanel / Vec::width;
    IntVec v[count];
    static PanelSums load(const int32_t* x) {
        PanelSums r;
        for (int i = 0; i < count; ++i) r.v[i] = IntVec::load(x + i * Vec::width);
        return r;
    }
    void store(int32_t* out) const { __builtin_memcpy(out, v, sizeof v); }
    friend PanelSums operator+(PanelSums a, const PanelSums& b) {
        for (int i = 0; i < count; ++i) a.v[i] = a.v[i] + b.v[i];
        return a;
    }
};

// ---- one step of 16 outputs, by instruction set -----------------------------------------------------------

#if defined(__AVX512VNNI__)

struct IntStep {
    using Number = int8_t;
    using Word = int32_t;  // a row's 4 elements
    using Weights = __m512i;
    using Sums = __m512i;
    template <int Bits, int Half>
    static Weights load(const uint8_t* line) {
        const __m512i bytes = _mm512_loadu_si512(line);
        if constexpr (Bits == 8) return bytes;
        return _mm512_and_si512(Half ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(0x0f));
    }
    static Sums zero() { return _mm512_setzero_si512(); }
    static Sums add(Word x, Weights w, Sums sums) {
        return _mm512_dpbusd_epi32(sums, w, _mm512_set1_epi32(x));
    }
    static PanelSums in_order(Sums sums) { return {{{sums}}}; }
};

#elif defined(__AVX512BW__)

// Lanes hold the sums of the even and the odd pairs of an output next to each other.
struct IntStep {
    using Number = int16_t;
    using Word = int64_t;  // 4 elements of 16 bits
    struct Weights {
        __m512i v[2];
    };
    using Sums = Weights;
    template <int Bits, int Half>
    static Weights load(const uint8_t* line) {
        Weights w;
        for (int i = 0; i < 2; ++i) {
            __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line) + i);
            if constexpr (Bits == 4) {
                bytes = _mm256_and_si256(Half ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(0x0f));
            }
            w.v[i] = _mm512_cvtepu8_epi16(bytes);
        }
        return w;
    }
    static Sums zero() { return {{_mm512_setzero_si512(), _mm512_setzero_si512()}}; }
    static Sums add(Word x, Weights w, Sums sums) {
        const __m512i value = _mm512_set1_epi64(x);
        for (int i = 0; i < 2; ++i) {
            sums.v[i] = _mm512_add_epi32(sums.v[i], _mm512_madd_epi16(w.v[i], value));
        }
        return sums;
    }
    static PanelSums in_order(Sums sums) {
        const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        const __m512i a = _mm512_permutex2var_epi32(sums.v[0], even, sums.v[1]);
        const __m512i b = _mm512_permutex2var_epi32(sums.v[0], odd, sums.v[1]);
        return {{{_mm512_add_epi32(a, b)}}};
    }
};

#elif defined(__AVXVNNI__)

struct IntStep {
    using Number = int8_t;
    using Word = int32_t;
    struct Weights {
        __m256i v[2];
    };
    using Sums = Weights;
    template <int Bits, int Half>
    static Weights load(const uint8_t* line) {
        Weights w;
        for (int i = 0; i < 2; ++i) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line) + i);
            w.v[i] = Bits == 8 ? bytes
                               : _mm256_and_si256(Half ? _mm256_srli_epi16(bytes, 4) : bytes,
                                                  _mm256_set1_epi8(0x0f));
        }
        return w;
    }
    static Sums zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
    static Sums add(Word x, Weights w, Sums sums) {
        const __m256i value = _mm256_set1_epi32(x);
        for (int i = 0; i < 2; ++i) sums.v[i] = _mm256_dpbusd_avx_epi32(sums.v[i], w.v[i], value);
        return sums;
    }
    static PanelSums in_order(Sums sums) { return {{{sums.v[0]}, {sums.v[1]}}}; }
};

#elif defined(__AVX2__)

// `vpmaddubsw` adds pairs of products in 16 bits. This cannot overflow if one side has 7 bits and a sign, and
// the other 8 bits without a sign. So for weights of 8 bits, |w| is multiplied by x with the sign of w.
struct IntStep {
    using Number = int8_t;
    using Word = int32_t;
    template <int Bits>
    struct Weights {
        __m256i size[2], value[2];
    };
    struct Sums {
        __m256i v[2];
    };
    template <int Bits, int Half>
    static Weights<Bits> load(const uint8_t* line) {
        Weights<Bits> w;
        for (int i = 0; i < 2; ++i) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line) + i);
            if constexpr (Bits == 8) {
                w.value[i] = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
                w.size[i] = _mm256_abs_epi8(w.value[i]);
            } else {
                w.size[i] =
                    _mm256_and_si256(Half ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(0x0f));
            }
        }
        return w;
    }
    static Sums zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
    template <int Bits>
    static Sums add(Word x, const Weights<Bits>& w, Sums sums) {
        const __m256i ones = _mm256_set1_epi16(1), row = _mm256_set1_epi32(x);
        for (int i = 0; i < 2; ++i) {
            const __m256i value = Bits == 8 ? _mm256_sign_epi8(row, w.value[i]) : row;
            const __m256i pairs = _mm256_maddubs_epi16(w.size[i], value);
            sums.v[i] = _mm256_add_epi32(sums.v[i], _mm256_madd_epi16(pairs, ones));
        }
        return sums;
    }
    // Two steps of weights of 4 bits: 4 products of 15 x 127 fit in 16 bits.
    static Sums add_pair(Word x, const Weights<4>& w, Word y, const Weights<4>& u, Sums sums) {
        const __m256i ones = _mm256_set1_epi16(1), first = _mm256_set1_epi32(x),
                      second = _mm256_set1_epi32(y);
        for (int i = 0; i < 2; ++i) {
            const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w.size[i], first),
                                                   _mm256_maddubs_epi16(u.size[i], second));
            sums.v[i] = _mm256_add_epi32(sums.v[i], _mm256_madd_epi16(pairs, ones));
        }
        return sums;
    }
    static PanelSums in_order(Sums sums) { return {{{sums.v[0]}, {sums.v[1]}}}; }
};

#else

struct IntStep {
    using Number = int16_t;
    using Word = int64_t;
    struct Weights {
        int16_t v[kIntPanel * kIntStep];
    };
    struct Sums {
        int32_t v[kIntPanel];
    };
    template <int Bits, int Half>
    static Weights load(const uint8_t* line) {
        Weights w;
        for (int i = 0; i < kIntPanel * kIntStep; ++i) {
            w.v[i] = Bits == 8 ? line[i] : Half ? line[i] >> 4 : line[i] & 0x0f;
        }
        return w;
    }
    static Sums zero() { return {}; }
    static Sums add(Word x, const Weights& w, Sums sums) {
        int16_t value[kIntStep];
        __builtin_memcpy(value, &x, sizeof x);
        for (int c = 0; c < kIntPanel; ++c) {
            const int16_t* at = w.v + c * kIntStep;
            sums.v[c] += at[0] * value[0] + at[1] * value[1] + at[2] * value[2] + at[3] * value[3];
        }
        return sums;
    }
    static PanelSums in_order(const Sums& sums) { return PanelSums::load(sums.v); }
};

#endif

// ---- numbers of more than 8 bits --------------------------------------------------------------------------

// The number stored at a place: all of it, or its low part.
using IntNumber = IntStep::Number;
inline constexpr bool kIntSplit = sizeof(IntNumber) == 1;

// Whether one instruction multiplies and adds to the sum, so that the next one waits for it.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
inline constexpr bool kIntDot = true;
#else
inline constexpr bool kIntDot = false;
#endif

// Whether two steps of weights of 4 bits are added before they are added to the sum; and the offset of the
// numbers that a tile multiplies.
#if defined(__AVX2__) && !defined(__AVX512BW__) && !defined(__AVXVNNI__)
inline constexpr bool kIntPairs = true;
template <int Bits>
inline constexpr int kIntAbove = Bits == 8 ? 0 : 8;
#else
inline constexpr bool kIntPairs = false;
template <int Bits>
inline constexpr int kIntAbove = 1 << (Bits - 1);
#endif

// Splits a block into low + 128 high; returns whether any high part is not 0.
inline bool split(const int16_t* block, IntNumber* low, int8_t* high) {
    int any = 0;
    for (int64_t j = 0; j < kIntBlock; ++j) {
        const int value = block[j];
        const int upper = kIntSplit && (value > 127 || value < -127) ? (value + 64) >> 7 : 0;
        low[j] = static_cast<IntNumber>(value - 128 * upper);
        high[j] = static_cast<int8_t>(upper);
        any |= upper;
    }
    return any != 0;
}

// sums [P][16] = 128 times the products of a row's outliers and P panels.
template <int Bits, int P>
inline void sum_outliers(const Outlier* begin, const Outlier* end, const uint8_t* weights, int64_t panel,
                         int32_t* sums) {
    IntStep::Sums acc[P];
    for (auto& sum : acc) sum = IntStep::zero();
    for (; begin < end; ++begin) {
        const uint8_t* line = weights + (Bits == 8 ? begin->step : begin->step / 2) * kIntLine<8>;
        const bool odd = Bits == 4 && begin->step % 2;
        for (int p = 0; p < P; ++p, line += panel) {
            const auto w = odd ? IntStep::load<Bits, 1>(line) : IntStep::load<Bits, 0>(line);
            acc[p] = IntStep::add(begin->word, w, acc[p]);
        }
    }
    for (int p = 0; p < P; ++p) {
        int32_t part[kIntPanel];
        IntStep::in_order(acc[p]).store(part);
        for (int64_t c = 0; c < kIntPanel; ++c) sums[p * kIntPanel + c] = 128 * part[c];
    }
}

// use(i, p, sums) for sums [height][P][16].
template <int P, class F>
inline void use_stored(const int32_t* sums, int64_t height, F use) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < height; ++i) {
        for (int64_t p = 0; p < P; ++p) use(i, p, PanelSums::load(sums + (i * P + p) * kIntPanel));
    }
}

#if defined(__AMX_TILE__)

// ---- AMX --------------------------------------------------------------------------------------------------

// Rows are in tiles of 16. The rest of the last tile may have any content.
inline constexpr int kIntUnit = 16, kIntRows = 32;
template <int /*Bits*/>
inline constexpr int int_panels(int rows) {
    return rows <= 16 ? 4 : 2;
}

// Bytes of a row in the tile's order.
inline constexpr int64_t int_row_bytes(int64_t depth) { return depth; }

// Stores a block of row i of a tile at its place: [16 rows][depth / 64][16][64].
inline void put_block(const int8_t* block, int64_t k, int64_t i, int64_t /*height*/, int64_t depth,
                      int8_t* rows) {
    int8_t* to = rows + i / 16 * 16 * depth + (k / kIntBlock * 16 + i % 16) * kIntBlock;
    _mm512_storeu_si512(to, _mm512_loadu_si512(block));
}

// Prefetches the weights of the tile that is kAhead tiles later.
template <int Bits>
inline void fetch_ahead(const uint8_t* packed) {
    constexpr int64_t kAhead = 8, kBytes = kTileLines * kIntLine<Bits>;
    for (int64_t at = 0; at < kBytes; at += kTileLine)
        __builtin_prefetch(packed + kAhead * kBytes + at, 0, 2);
}

// The number of steps of a group in one tile.
inline constexpr int64_t tile_steps(int64_t group) {
    return (group % kIntBlock ? kIntGroup : kIntBlock) / kIntStep;
}

struct IntTiles : AmxTiles {
    explicit IntTiles(int64_t group) : AmxTiles(tile_steps(group)) {}
};

// The `steps` steps of a panel from `step` on, one byte for each weight.
template <int Bits>
inline const uint8_t* unpacked(const uint8_t* panel, int64_t step, int64_t steps, uint8_t* room) {
    const uint8_t* packed = panel + step * kIntLine<Bits>;
    if (step % kTileLines == 0) fetch_ahead<Bits>(packed);
    if constexpr (Bits == 8) return packed;
    const __m512i low = _mm512_set1_epi8(0x0f);
    fence();  // the last tile was read from there
    for (int64_t s = 0; s < steps; s += 2) {
        const __m512i both = _mm512_loadu_si512(packed + s * kIntLine<4>);
        _mm512_store_si512(room + s * 64, _mm512_and_si512(both, low));
        _mm512_store_si512(room + (s + 1) * 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    }
    fence();
    return room;
}

// Calls use(i, p, sums) with the sums rows . panels over the depth [begin, end), for row i < height and panel
// p < P; `panel` is the distance of panels in bytes.
template <int Bits, int R, int P, class F>
inline void int_tile(const int8_t* rows, int64_t height, int64_t depth, const uint8_t* weights, int64_t panel,
                     int64_t begin, int64_t end, Ahead /* fetch_ahead does it */, F use) {
    alignas(64) uint8_t room[kTileBytes];
    alignas(64) int32_t sums[R * P * kIntPanel];
    const int64_t steps = end - begin < kIntBlock ? kIntGroup / kIntStep : kIntBlock / kIntStep;
    zero_sums();
    for (int64_t k = begin; k < end; k += steps * kIntStep) {
        const int8_t* row = rows + k / kIntBlock * kTileBytes + k % kIntBlock;
        add_products<IntProduct, R>(row, 16 * depth, [&](int p) {
            return unpacked<Bits>(weights + p * panel, k / kIntStep, steps, room);
        });
    }
    store_sums<R>(sums);
    fence();
    use_stored<P>(sums, height, use);
}

#else

// ---- the tile ---------------------------------------------------------------------------------------------

inline constexpr int kIntUnit = 1;

// The rows of a tile, by the number of registers, and the number of panels: several panels for few rows, so
// that there are enough sums to hide the latency. Weights of 4 bits have groups. At their ends the sums are
// converted to floats while the products of the next group are computed, which is fast as long as the
// compiler has enough registers.
#if defined(__AVX512VNNI__)
inline constexpr int kIntRows = 14;
template <int Bits>
inline constexpr int int_panels(int rows) {
    return rows <= 6 ? 4 : rows <= 8 || Bits == 8 ? 2 : 1;
}
#elif defined(__AVX512BW__)
inline constexpr int kIntRows = 12;
template <int /*Bits*/>
inline constexpr int int_panels(int) {
    return 1;
}
#elif defined(__AVXVNNI__)
inline constexpr int kIntRows = 6;
template <int /*Bits*/>
inline constexpr int int_panels(int rows) {
    return rows <= 3 ? 2 : 1;
}
#elif defined(__AVX2__)
inline constexpr int kIntRows = 6;
template <int /*Bits*/>
inline constexpr int int_panels(int rows) {
    return rows <= 1 ? 2 : 1;
}
#else
inline constexpr int kIntRows = 2;
template <int /*Bits*/>
inline constexpr int int_panels(int) {
    return 1;
}
#endif

// Up to this many panels, a tile passes its sums on in registers. With more, gcc would spill within the loop.
#if defined(__AVX512VNNI__)
inline constexpr int kIntHeld = 16;
#else
inline constexpr int kIntHeld = 0;
#endif

inline constexpr int64_t int_row_bytes(int64_t depth) {
    return depth / kIntStep * static_cast<int64_t>(sizeof(IntStep::Word));
}

// Stores a block of row i of a tile at its place: [depth / 4][height] words.
inline void put_block(const IntNumber* block, int64_t k, int64_t i, int64_t height, int64_t /*depth*/,
                      int8_t* rows) {
    using Word = IntStep::Word;
    auto* to = reinterpret_cast<Word*>(rows) + k / kIntStep * height + i;
    for (int64_t s = 0; s < kIntBlock / kIntStep; ++s) {
        static_assert(sizeof(Word) == kIntStep * sizeof(IntNumber));
        __builtin_memcpy(to + s * height, block + s * kIntStep, sizeof(Word));
    }
}

// There is no state to configure.
struct IntTiles {
    explicit IntTiles(int64_t /*group*/) {}
};

// Calls use(i, p, sums) with the sums rows . panels over the depth [begin, end), for row i < R = height and
// panel p < P; `panel` is the distance of panels in bytes. If there are few sums, even and odd steps have
// separate sums, so that they do not wait for each other.
template <int Bits, int R, int P, class F, class Step = IntStep>
inline void int_tile(const int8_t* rows, int64_t /*height*/, int64_t /*depth*/, const uint8_t* weights,
                     int64_t panel, int64_t begin, int64_t end, Ahead ahead, F use) {
    constexpr int C = kIntDot && 2 * R * P * sizeof(typename Step::Sums) <= 8 * sizeof(Vec) ? 2 : 1;
    typename Step::Sums acc[C][R][P];
    for (auto& chain : acc) {
        for (auto& row : chain) {
            for (auto& sum : row) sum = Step::zero();
        }
    }
    const auto* words = reinterpret_cast<const typename Step::Word*>(rows);
    const auto load = [&]<int Half>(int64_t s, auto* w) {
        const uint8_t* line = weights + (Bits == 8 ? s : s / 2) * kIntLine<8>;
        ahead.fetch(s);
#pragma GCC unroll 8
        for (int v = 0; v < P; ++v) w[v] = Step::template load<Bits, Half>(line + v * panel);
    };
    const auto each = [&](auto add) {
#pragma GCC unroll 32
        for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
            for (int v = 0; v < P; ++v) add(i, v);
        }
    };
    using Weights = decltype(Step::template load<Bits, 0>(weights));
    for (int64_t s = begin / kIntStep; s < end / kIntStep; s += 2) {
        const typename Step::Word *x = words + s * R, *y = x + R;
        Weights even[P], odd[P];
        load.template operator()<0>(s, even);
        if constexpr (Bits == 4 && kIntPairs) {
            load.template operator()<1>(s + 1, odd);
            each([&](int i, int v) {
                acc[0][i][v] = Step::add_pair(x[i], even[v], y[i], odd[v], acc[0][i][v]);
            });
        } else {
            each([&](int i, int v) { acc[0][i][v] = Step::add(x[i], even[v], acc[0][i][v]); });
            load.template operator()<1>(s + 1, odd);
            each([&](int i, int v) { acc[C - 1][i][v] = Step::add(y[i], odd[v], acc[C - 1][i][v]); });
        }
    }
    const auto sum = [&](int i, int v) {
        const PanelSums sums = Step::in_order(acc[0][i][v]);
        return C == 2 ? sums + Step::in_order(acc[C - 1][i][v]) : sums;
    };
    if constexpr (R * P <= kIntHeld) {
        each([&](int i, int v) { use(i, v, sum(i, v)); });
    } else {
        alignas(64) int32_t sums[R * P * kIntPanel];
        each([&](int i, int v) { sum(i, v).store(sums + (i * P + v) * kIntPanel); });
        use_stored<P>(sums, R, use);
    }
}

#endif

TTS_END_ISA
