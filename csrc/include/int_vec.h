// Conversions between floats and whole numbers of 8, 16 and 32 bits. All are exact, or round as in IEEE 754.
#pragma once

#include <cstdint>

#include "isa.h"
#include "vec.h"

TTS_BEGIN_ISA

// Stores Vec::width floats, rounded to the nearest even whole number. Each must fit in I.
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

// Vec::width whole numbers of 32 bits.
struct IntVec {
#if defined(__AVX512F__)
    __m512i v;
    static IntVec load(const int32_t* x) { return {_mm512_loadu_si512(x)}; }
    static IntVec load(const int16_t* x) {
        return {_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
    }
    static IntVec load(const int8_t* x) {
        return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
    }
    static IntVec all(int32_t x) { return {_mm512_set1_epi32(x)}; }
    Vec to_float() const { return {_mm512_maskz_cvtepi32_ps(0xffff, v)}; }
    int32_t sum() const { return _mm512_reduce_add_epi32(v); }
    friend IntVec operator+(IntVec a, IntVec b) { return {_mm512_add_epi32(a.v, b.v)}; }
    friend IntVec operator-(IntVec a, IntVec b) { return {_mm512_sub_epi32(a.v, b.v)}; }
#elif defined(__AVX2__)
    __m256i v;
    static IntVec load(const int32_t* x) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))}; }
    static IntVec load(const int16_t* x) {
        return {_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
    }
    static IntVec load(const int8_t* x) {
        return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)))};
    }
    static IntVec all(int32_t x) { return {_mm256_set1_epi32(x)}; }
    Vec to_float() const { return {_mm256_cvtepi32_ps(v)}; }
    int32_t sum() const {
        __m128i x = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
    }
    friend IntVec operator+(IntVec a, IntVec b) { return {_mm256_add_epi32(a.v, b.v)}; }
    friend IntVec operator-(IntVec a, IntVec b) { return {_mm256_sub_epi32(a.v, b.v)}; }
#else
    int32_t v[Vec::width];
    template <class I>  // int8_t, int16_t, int32_t
    static IntVec load(const I* x) {
        IntVec r;
        for (int i = 0; i < Vec::width; ++i) r.v[i] = x[i];
        return r;
    }
    static IntVec all(int32_t x) {
        IntVec r;
        for (int32_t& lane : r.v) lane = x;
        return r;
    }
    Vec to_float() const {
        Vec r;
        for (int i = 0; i < Vec::width; ++i) r.v[i] = static_cast<float>(v[i]);
        return r;
    }
    friend IntVec operator+(IntVec a, IntVec b) {
        for (int i = 0; i < Vec::width; ++i) a.v[i] += b.v[i];
        return a;
    }
    friend IntVec operator-(IntVec a, IntVec b) {
        for (int i = 0; i < Vec::width; ++i) a.v[i] -= b.v[i];
        return a;
    }
    int32_t sum() const {
        int32_t total = 0;
        for (const int32_t lane : v) total += lane;
        return total;
    }
#endif
};

TTS_END_ISA
