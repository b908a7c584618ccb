// Between floats and whole numbers of 8, 16 and 32 bits. All of it is exact, or rounds as IEEE 754 does.
#pragma once

#include <cstdint>

#include "isa.h"
#include "vec.h"

TTS_BEGIN_ISA

// Stores Vec::width floats, each within what I holds, rounded to the nearest even whole number.
template <class I>  // int8_t, uint8_t, int16_t
inline void store_rounded(Vec x, I* out) {
#if defined(__AVX512F__)
    const __m512i whole = _mm512_cvtps_epi32(x.v);
    if constexpr (sizeof(I) == 2) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(whole));
    } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(whole));
    }
#elif defined(__AVX2__)
    const __m256i whole = _mm256_cvtps_epi32(x.v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    if constexpr (sizeof(I) == 2) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), words);
    } else {
        const bool has_sign = static_cast<I>(-1) < 0;
        const __m128i bytes = has_sign ? _mm_packs_epi16(words, words) : _mm_packus_epi16(words, words);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out), bytes);
    }
#else
    const Vec whole = round(x);
    for (int i = 0; i < Vec::width; ++i) out[i] = static_cast<I>(whole.v[i]);
#endif
}

// Vec::width whole numbers less Times times `other`, as floats; Times is 0 or a power of two.
template <int Times>
inline Vec load_less(const int32_t* x, int32_t other) {
    constexpr int shift = Times ? __builtin_ctz(Times) : 0;
#if defined(__AVX512F__)
    const __m512i minus = _mm512_slli_epi32(_mm512_set1_epi32(Times ? other : 0), shift);
    return {_mm512_maskz_cvtepi32_ps(0xffff, _mm512_sub_epi32(_mm512_loadu_si512(x), minus))};
#elif defined(__AVX2__)
    const __m256i whole = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    const __m256i minus = _mm256_slli_epi32(_mm256_set1_epi32(Times ? other : 0), shift);
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(whole, minus))};
#else
    Vec out;
    for (int i = 0; i < Vec::width; ++i) out.v[i] = static_cast<float>(x[i] - Times * other);
    return out;
#endif
}

TTS_END_ISA
