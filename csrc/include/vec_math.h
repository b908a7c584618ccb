// Functions of a vector of floats beyond arithmetic: exp2, log2, tanh, transposition, sums of many vectors.
#pragma once

#include "vec.h"

TTS_BEGIN_ISA

// 2**r for |r| <= 1/2 within 1.7e-7 relative (coefficients: Cephes exp2f).
inline Vec exp2_fraction(Vec r) {
    Vec p = Vec::all(1.535336188319500e-4f);
    p = fma(p, r, Vec::all(1.339887440266574e-3f));
    p = fma(p, r, Vec::all(9.618437357674640e-3f));
    p = fma(p, r, Vec::all(5.550332471162809e-2f));
    p = fma(p, r, Vec::all(2.402264791363012e-1f));
    p = fma(p, r, Vec::all(6.931472028550421e-1f));
    return fma(p, r, Vec::all(1.0f));
}

// 2**x; 0 for x below -126, infinite from 128, NaN stays NaN.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
    // reduce gives x - round(x), and 0 for an infinite x; scalef is exact at both ends.
    const Vec r{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    return {_mm512_scalef_ps(exp2_fraction(r).v, round(x).v)};
#else
    const Vec low = Vec::all(-126.0f), high = Vec::all(127.99999f);
    const Vec clamped = max(low, min(high, x));  // NaN: min and max give their second argument, x
    const Vec n = min(round(clamped), Vec::all(127.0f));
    const Vec y = scale_exponent(exp2_fraction(clamped - n), n);
    return select_less(high, x, Vec::all(kInfinity), select_less(x, low, Vec::zero(), y));
#endif
}

inline float exp2(float x) {
    float lanes[Vec::width];
    exp2(Vec::all(x)).store(lanes);
    return lanes[0];
}

// log2(x) for a normal x > 0, within 2 units in the last place of ln x / ln 2 (polynomial: Cephes logf).
// log2(0) = -inf; NaN and +inf are unchanged.
inline float log2(float x) {
    if (x == 0.0f) return -kInfinity;
    if (!(x < kInfinity)) return x;
    const uint32_t bits = float_bits(x);
    int32_t e = static_cast<int32_t>(bits >> 23) - 126;
    float m = bit_float((bits & 0x007fffffu) | 0x3f000000u);  // in [1/2, 1)
    if (m < 0.70710678f) {
        m += m;
        --e;
    }
    const float z = m - 1.0f;
    float p = 7.0376836292e-2f;
    p = p * z - 1.1514610310e-1f;
    p = p * z + 1.1676998740e-1f;
    p = p * z - 1.2420140846e-1f;
    p = p * z + 1.4249322787e-1f;
    p = p * z - 1.6668057665e-1f;
    p = p * z + 2.0000714765e-1f;
    p = p * z - 2.4999993993e-1f;
    p = p * z + 3.3333331174e-1f;
    const float y = p * z * z * z - 0.5f * z * z;  // ln m = z + y
    return (y + z) * 1.44269504f + static_cast<float>(e);
}

// tanh(x) = e / (e + 2), e = exp(2x) - 1 without cancellation: exp(2x) = 2**n (1 + q), e = 2**n q + (2**n -
// 1).
inline Vec tanh(Vec x) {
    const Vec y = max(Vec::all(-20.0f), min(Vec::all(20.0f), x + x));  // NaN passes, as in exp
    const Vec n = round(y * Vec::all(1.44269504088896341f));
    const Vec r = fma(n, Vec::all(2.12194440e-4f), fma(n, Vec::all(-0.693359375f), y));
    Vec p = Vec::all(1.9875691500e-4f);
    p = fma(p, r, Vec::all(1.3981999507e-3f));
    p = fma(p, r, Vec::all(8.3334519073e-3f));
    p = fma(p, r, Vec::all(4.1665795894e-2f));
    p = fma(p, r, Vec::all(1.6666665459e-1f));
    p = fma(p, r, Vec::all(5.0000001201e-1f));
    const Vec q = fma(p * r, r, r), power = scale_exponent(Vec::all(1.0f), n);
    const Vec e = fma(power, q, power - Vec::all(1.0f));
    return e / (e + Vec::all(2.0f));
}

// ---- blocks of width x width -----------------------------------------------------------------------------

#if defined(__AVX512F__)
// columns[j] has in lane i lane j of rows[i], moved as bits.
inline void transpose(const Vec (&rows)[16], Vec* columns) {
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {  // pairs of rows, by floats
        b[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
        b[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // four rows: a[i + c] holds columns c, 4 + c, 8 + c, 12 + c
        a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {  // quarters of 128 bits
        const __m512 low01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44);
        const __m512 high01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xee);
        const __m512 low23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44);
        const __m512 high23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xee);
        columns[c] = {_mm512_shuffle_f32x4(low01, low23, 0x88)};
        columns[4 + c] = {_mm512_shuffle_f32x4(low01, low23, 0xdd)};
        columns[8 + c] = {_mm512_shuffle_f32x4(high01, high23, 0x88)};
        columns[12 + c] = {_mm512_shuffle_f32x4(high01, high23, 0xdd)};
    }
}
#endif

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < width, moved as bits.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
#if defined(__AVX512F__)
    Vec rows[16], columns[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = Vec::load(from + i * from_stride);
    transpose(rows, columns);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) columns[j].store(to + j * to_stride);
#elif defined(__AVX2__)
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * from_stride);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        _mm256_storeu_ps(to + c * to_stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
        _mm256_storeu_ps(to + (4 + c) * to_stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
    }
#else
    for (int i = 0; i < Vec::width; ++i) {
        for (int j = 0; j < Vec::width; ++j)
            __builtin_memcpy(to + j * to_stride + i, from + i * from_stride + j, 4);
    }
#endif
}

// Lane i of the result is the sum of the lanes of a[i].
inline Vec sum_each(const Vec* a) {
#if defined(__AVX512F__)
    __m512 quarter[4];  // quarter[j]: 128-bit block b holds four partial sums of a[4 * b + j]
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const auto half = [](Vec x, Vec y) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(x.v, y.v, 0x44), _mm512_shuffle_f32x4(x.v, y.v, 0xee));
        };
        const __m512 low = half(a[j], a[4 + j]), high = half(a[8 + j], a[12 + j]);
        quarter[j] =
            _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    }
    const auto pair = [](__m512 x, __m512 y) {
        return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    };
    const __m512 first = pair(quarter[0], quarter[1]), second = pair(quarter[2], quarter[3]);
    return {_mm512_add_ps(_mm512_shuffle_ps(first, second, 0x44), _mm512_shuffle_ps(first, second, 0xee))};
#elif defined(__AVX2__)
    __m256 half[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        half[j] = _mm256_add_ps(_mm256_permute2f128_ps(a[j].v, a[4 + j].v, 0x20),
                                _mm256_permute2f128_ps(a[j].v, a[4 + j].v, 0x31));
    }
    const auto pair = [](__m256 x, __m256 y) {
        return _mm256_add_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
    };
    const __m256 first = pair(half[0], half[1]), second = pair(half[2], half[3]);
    return {_mm256_add_ps(_mm256_shuffle_ps(first, second, 0x44), _mm256_shuffle_ps(first, second, 0xee))};
#else
    float sums[Vec::width];
    for (int i = 0; i < Vec::width; ++i) sums[i] = reduce_add(a[i]);
    return Vec::load(sums);
#endif
}

TTS_END_ISA
