// The order in which candidates are kept: higher score first; NaN below -inf; -0.0 equal to 0.0.
//
// A score becomes a signed integer key, greater for better, so that comparing keys is the whole order. Ties
// go to the lower index: with an index in the low half, `ranked` makes one 64-bit number of the two, and no
// two are equal.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"
#include "vec.h"

TTS_BEGIN_ISA

inline constexpr int32_t kNoKey = INT32_MIN;       // worse than any score: a lane without one
inline constexpr int32_t kNaNKey = INT32_MIN + 1;  // the bits of -inf give INT32_MIN + 0x007fffff

// Floats order like their bits if positive, in reverse if negative; adding 0.0 turns -0.0 into 0.0.
inline int32_t order_key(float score) {
    if (is_nan(score)) return kNaNKey;
    const auto bits = static_cast<int32_t>(float_bits(score + 0.0f));
    return bits ^ ((bits >> 31) & INT32_MAX);
}

// A key and an index below 2**32 as one number: greater is better.
inline uint64_t ranked(int32_t key, uint32_t index) {
    const uint32_t high = static_cast<uint32_t>(key) ^ 0x80000000u;
    return uint64_t{high} << 32 | static_cast<uint32_t>(~index);
}

inline int32_t ranked_key(uint64_t rank) {
    return static_cast<int32_t>(static_cast<uint32_t>(rank >> 32) ^ 0x80000000u);
}

inline uint32_t ranked_index(uint64_t rank) { return ~static_cast<uint32_t>(rank); }

// A vector of keys, as wide as Vec.
struct Keys {
    static constexpr int width = Vec::width;

#if defined(__AVX512F__)

    __m512i v;
    static Keys all(int32_t x) { return {_mm512_set1_epi32(x)}; }
    static Keys load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
    void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
    static Keys of(Vec score) {
        const __m512i bits = _mm512_castps_si512(_mm512_add_ps(score.v, _mm512_setzero_ps()));
        const __m512i flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(INT32_MAX));
        const __mmask16 nan = _mm512_cmp_ps_mask(score.v, score.v, _CMP_UNORD_Q);
        return {_mm512_mask_mov_epi32(_mm512_xor_si512(bits, flip), nan, _mm512_set1_epi32(kNaNKey))};
    }
    static Keys max(Keys a, Keys b) { return {_mm512_max_epi32(a.v, b.v)}; }
    int32_t max() const { return _mm512_reduce_max_epi32(v); }
    uint32_t equal(Keys b) const { return _mm512_cmpeq_epi32_mask(v, b.v); }  // bit i: lane i
    uint32_t greater(Keys b) const { return _mm512_cmpgt_epi32_mask(v, b.v); }
    // This, with `x` in the lanes whose bits are set.
    Keys replace(uint32_t lanes, int32_t x) const {
        return {_mm512_mask_set1_epi32(v, static_cast<__mmask16>(lanes), x)};
    }

#elif defined(__AVX2__)

    __m256i v;
    static Keys all(int32_t x) { return {_mm256_set1_epi32(x)}; }
    static Keys load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
    void store(int32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static Keys of(Vec score) {
        const __m256i bits = _mm256_castps_si256(_mm256_add_ps(score.v, _mm256_setzero_ps()));
        const __m256i flip = _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(INT32_MAX));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(score.v, score.v, _CMP_UNORD_Q));
        return {_mm256_blendv_epi8(_mm256_xor_si256(bits, flip), _mm256_set1_epi32(kNaNKey), nan)};
    }
    static Keys max(Keys a, Keys b) { return {_mm256_max_epi32(a.v, b.v)}; }
    int32_t max() const {
        __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
        return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
    }
    uint32_t equal(Keys b) const { return lanes(_mm256_cmpeq_epi32(v, b.v)); }
    uint32_t greater(Keys b) const { return lanes(_mm256_cmpgt_epi32(v, b.v)); }
    Keys replace(uint32_t lanes, int32_t x) const {
        const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i set =
            _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bit), bit);
        return {_mm256_blendv_epi8(v, _mm256_set1_epi32(x), set)};
    }
    static uint32_t lanes(__m256i mask) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
    }

#else

    Vec::ints v;
    static Keys all(int32_t x) { return {Vec::ints{x, x, x, x}}; }
    static Keys load(const int32_t* p) {
        Keys k;
        __builtin_memcpy(&k.v, p, sizeof k.v);
        return k;
    }
    void store(int32_t* p) const { __builtin_memcpy(p, &v, sizeof v); }
    static Keys of(Vec score) {
        Keys k;
        for (int i = 0; i < width; ++i) k.v[i] = order_key(score.v[i]);
        return k;
    }
    static Keys max(Keys a, Keys b) { return {a.v > b.v ? a.v : b.v}; }
    int32_t max() const {
        const int32_t x = v[0] > v[1] ? v[0] : v[1], y = v[2] > v[3] ? v[2] : v[3];
        return x > y ? x : y;
    }
    uint32_t equal(Keys b) const { return lanes(v == b.v); }
    uint32_t greater(Keys b) const { return lanes(v > b.v); }
    Keys replace(uint32_t lanes, int32_t x) const {
        const Vec::ints bit = {1, 2, 4, 8};
        return {(static_cast<int32_t>(lanes) & bit) == bit ? all(x).v : v};
    }
    static uint32_t lanes(Vec::ints mask) {
        return static_cast<uint32_t>((mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8));
    }

#endif
};

// The keys of n >= 1 scores from p, the lanes beyond them kNoKey.
template <class T>
inline Keys load_keys(const T* p, int64_t n) {
    if (n >= Keys::width) return Keys::of(Vec::load(p));
    const uint32_t lanes = (1u << n) - 1u;
    return Keys::of(Vec::load(p, static_cast<int>(n))).replace(~lanes & ((1u << Keys::width) - 1u), kNoKey);
}

TTS_END_ISA
