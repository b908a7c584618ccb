// Transposes keys in registers: W keys along a vector, some elements at a time.
//
//   keys[i] -> W rows of elements;   columns[s][i] = step s of key i
//
// A step is an element as float32, or a pair of bfloat16 if they are multiplied as pairs. A load reads 16
// bytes of each key: four floats, or eight 16-bit elements. With AVX-512 it reads a cache line of float32,
// which is a fifth faster; for pairs this gives no gain.
#pragma once

#include "tree_attention_item.h"

TTS_BEGIN_ISA

// Vectors of four bytes: lane i of out[s] is the s-th word of the 16 bytes at rows[i].
#if defined(__AVX512F__)

inline void transpose_words(const void* const* rows, Vec* out) {
    __m512 v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // 128-bit block b: row 4 b + j
        const auto load = [&](int i) { return _mm_loadu_si128(static_cast<const __m128i*>(rows[i])); };
        __m512i x = _mm512_castsi128_si512(load(j));
        x = _mm512_inserti32x4(x, load(4 + j), 1);
        x = _mm512_inserti32x4(x, load(8 + j), 2);
        v[j] = _mm512_castsi512_ps(_mm512_inserti32x4(x, load(12 + j), 3));
    }
    const __m512 t0 = _mm512_unpacklo_ps(v[0], v[1]), t1 = _mm512_unpackhi_ps(v[0], v[1]);
    const __m512 t2 = _mm512_unpacklo_ps(v[2], v[3]), t3 = _mm512_unpackhi_ps(v[2], v[3]);
    out[0] = {_mm512_shuffle_ps(t0, t2, 0x44)};
    out[1] = {_mm512_shuffle_ps(t0, t2, 0xee)};
    out[2] = {_mm512_shuffle_ps(t1, t3, 0x44)};
    out[3] = {_mm512_shuffle_ps(t1, t3, 0xee)};
}

// The lower and the upper 16 bits of each lane as float32.
template <class T>
inline Vec low_half(Vec x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    if constexpr (__is_same(T, bf16)) return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
    return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits))};
}
template <class T>
inline Vec high_half(Vec x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    if constexpr (__is_same(T, bf16)) {
        return {
            _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)))};
}

#elif defined(__AVX2__)

inline void transpose_words(const void* const* rows, Vec* out) {
    __m256 v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // 128-bit half b: row 4 b + j
        const auto load = [&](int i) { return _mm_loadu_ps(static_cast<const float*>(rows[i])); };
        v[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(load(j)), load(4 + j), 1);
    }
    const __m256 t0 = _mm256_unpacklo_ps(v[0], v[1]), t1 = _mm256_unpackhi_ps(v[0], v[1]);
    const __m256 t2 = _mm256_unpacklo_ps(v[2], v[3]), t3 = _mm256_unpackhi_ps(v[2], v[3]);
    out[0] = {_mm256_shuffle_ps(t0, t2, 0x44)};
    out[1] = {_mm256_shuffle_ps(t0, t2, 0xee)};
    out[2] = {_mm256_shuffle_ps(t1, t3, 0x44)};
    out[3] = {_mm256_shuffle_ps(t1, t3, 0xee)};
}

inline Vec from_halves(__m256i words) {  // float16 in the lower 16 bits of each lane, zeros above
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(packed))};
}
template <class T>
inline Vec low_half(Vec x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    if constexpr (__is_same(T, bf16)) return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
    return from_halves(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff)));
}
template <class T>
inline Vec high_half(Vec x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    if constexpr (__is_same(T, bf16)) {
        return {
            _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    return from_halves(_mm256_srli_epi32(bits, 16));
}

#endif

#if defined(__AVX512F__)
inline constexpr int64_t kFloatBytes = 64;
#else
inline constexpr int64_t kFloatBytes = 16;
#endif

template <class T>
struct KeyColumns {
    static constexpr int kElements = (sizeof(T) == 4 ? kFloatBytes : 16) / sizeof(T);
    static constexpr int kSteps = kPairs<T> ? kElements / 2 : kElements;

    // Elements [d, d + kElements) of W keys.
    static void load(const T* const* keys, int64_t d, Vec* columns) {
#if defined(__AVX512F__)
        if constexpr (kSteps == 16) {
            Vec lines[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) lines[i] = Vec::load(keys[i] + d);
            return transpose(lines, columns);
        }
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
        const void* rows[Vec::width];
#pragma GCC unroll 16
        for (int i = 0; i < Vec::width; ++i) rows[i] = keys[i] + d;
        if constexpr (kSteps == 4) {
            transpose_words(rows, columns);
        } else {
            Vec words[4];
            transpose_words(rows, words);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                columns[2 * i] = low_half<T>(words[i]);
                columns[2 * i + 1] = high_half<T>(words[i]);
            }
        }
#else
        for (int s = 0; s < kSteps; ++s) {
            for (int i = 0; i < Vec::width; ++i) columns[s].v[i] = to_float(keys[i][d + s]);
        }
#endif
    }
};

TTS_END_ISA
