// A vector of floats, as wide as the instruction set allows (16 with AVX-512, 8 with AVX2, else 4).
//
// One interface over three implementations, with only what the kernels need. Loads and stores convert from
// and to bfloat16 and float16; arithmetic is float32. `load(p, n)` and `store(p, n)` access only n < width
// elements; the other lanes are read as 0.
#pragma once

#include <cstdint>

#include "bits.h"
#include "dtypes.h"
#include "isa.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

TTS_BEGIN_ISA

// ---- scalars ---------------------------------------------------------------------------------------------

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) { return bit_float(static_cast<uint32_t>(x.bits) << 16); }

// Exact for every float16: the exponent is rebased by a multiplication, which also handles subnormals.
inline float to_float(f16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
    if (rest >= 0x0f800000u) return bit_float(sign | 0x7f800000u | (rest & 0x007fffffu));  // inf, NaN
    return bit_float(sign | float_bits(bit_float(rest) * 0x1p112f));
}

template <class T>
inline T from_float(float x);

template <>
inline float from_float<float>(float x) {
    return x;
}

// Rounds to nearest even. NaN stays NaN.
template <>
inline bf16 from_float<bf16>(float x) {
    const uint32_t bits = float_bits(x);
    if (is_nan(x)) return {static_cast<uint16_t>((bits >> 16) | 0x0040u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline f16 from_float<f16>(float x) {
    const uint32_t bits = float_bits(x);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
    if (magnitude < 0x38800000u) {                                                 // subnormal in float16
        const float shifted = bit_float(magnitude) + 0.5f;  // 2**-24 is the last bit of 0.5
        return {static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// ---- vectors ---------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

struct Vec {
    static constexpr int width = 16;
    __m512 v;
    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec all(float x) { return {_mm512_set1_ps(x)}; }
    static Vec all(f16 x) { return {_mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(x.bits)))}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static Vec load(const f16* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
    static Vec load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(mask(n), p)); }
    static Vec load(const f16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p))}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
    void store(f16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half(v)); }
    void store(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
    void store(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), narrow(v)); }
    void store(f16* p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), half(v)); }

    static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
    static Vec widen(__m256i h) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
    }
    static __m256i half(__m512 x) {
        return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static __m256i narrow(__m512 x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i round = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(round, nan, quiet), 16));
    }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline float reduce_add(
    Vec a) {  // by halves, as at the other widths: the header's own order is the compiler's affair
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a where x < y, else b (b where either is NaN)
inline Vec select_less(Vec x, Vec y, Vec a, Vec b) {
    return {_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), a.v)};
}
// p * 2**n for whole n in [-126, 127]
inline Vec scale_exponent(Vec p, Vec n) {
    const __m512i e =
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
    return {_mm512_mul_ps(p.v, _mm512_castsi512_ps(e))};
}

#elif defined(__AVX2__)

struct Vec {
    static constexpr int width = 8;
    __m256 v;
    static Vec zero() { return {_mm256_setzero_ps()}; }
    static Vec all(float x) { return {_mm256_set1_ps(x)}; }
    static Vec all(f16 x) { return {_mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(x.bits)))}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vec load(const bf16* p) {
        const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
    }
    static Vec load(const f16* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
    template <class T>
    static Vec load(const T* p, int n) {
        T all[width] = {};
        __builtin_memcpy(all, p, static_cast<unsigned>(n) * sizeof(T));
        return load(all);
    }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    void store(bf16* p) const {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i round = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(round, quiet, nan), 16);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
    }
    void store(f16* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    template <class T>
    void store(T* p, int n) const {
        T all[width];
        store(all);
        __builtin_memcpy(p, all, static_cast<unsigned>(n) * sizeof(T));
    }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }  // b where either is NaN
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline float reduce_add(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float reduce_max(Vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec select_less(Vec x, Vec y, Vec a, Vec b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_LT_OQ))};
}
inline Vec scale_exponent(Vec p, Vec n) {
    const __m256i e =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(p.v, _mm256_castsi256_ps(e))};
}

#else  // four lanes by the compiler's own vectors: SSE2, NEON, whatever the baseline has

struct Vec {
    static constexpr int width = 4;
    typedef float floats __attribute__((vector_size(16)));
    typedef int32_t ints __attribute__((vector_size(16)));
    floats v;
    static Vec zero() { return all(0.0f); }
    static Vec all(float x) { return {floats{x, x, x, x}}; }
    static Vec all(f16 x) { return all(to_float(x)); }
    static Vec load(const float* p) {
        Vec r;
        __builtin_memcpy(&r.v, p, sizeof r.v);
        return r;
    }
    template <class T>
    static Vec load(const T* p) {
        return {floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
    }
    template <class T>
    static Vec load(const T* p, int n) {
        Vec r = zero();
        for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
        return r;
    }
    void store(float* p) const { __builtin_memcpy(p, &v, sizeof v); }
    template <class T>
    void store(T* p) const {
        store(p, width);
    }
    template <class T>
    void store(T* p, int n) const {
        for (int i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
    }
};

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMAF)  // NEON
    Vec r;
    for (int i = 0; i < Vec::width; ++i) r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return r;
#else
    return {a.v * b.v + c.v};
#endif
}
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }  // b where either is NaN
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float reduce_max(Vec a) {
    const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
    return x > y ? x : y;
}
// Adding 1.5 * 2**23 leaves no bits for a fraction; correct for |a| < 2**22.
inline Vec round(Vec a) {
    const Vec magic = Vec::all(12582912.0f);
    return (a + magic) - magic;
}
inline Vec select_less(Vec x, Vec y, Vec a, Vec b) { return {x.v < y.v ? a.v : b.v}; }
inline Vec scale_exponent(Vec p, Vec n) {
    const Vec::ints e = (__builtin_convertvector(n.v, Vec::ints) + 127) << 23;
    return {p.v * (Vec::floats)e};  // the same bits
}

#endif

// Bit i: lane i of a is at least lane i of b, and neither is NaN.
inline uint32_t at_least(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
#else
    const auto mask = a.v >= b.v;
    return static_cast<uint32_t>((mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8));
#endif
}

// exp(x) within 2 units in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 6 in r
// (coefficients: Cephes expf), scaled by 2**n. Below -87.33 the result is 0; above 88.72 it is infinite;
// NaN stays NaN.
inline Vec exp(Vec x) {
    const Vec low = Vec::all(-87.33654f), high = Vec::all(88.72283f);
    const Vec clamped = max(low, min(high, x));  // NaN: min and max give their second argument, x
    const Vec n = min(round(clamped * Vec::all(1.44269504088896341f)), Vec::all(127.0f));
    Vec r = fma(n, Vec::all(-0.693359375f), clamped);
    r = fma(n, Vec::all(2.12194440e-4f), r);
    Vec p = Vec::all(1.9875691500e-4f);
    p = fma(p, r, Vec::all(1.3981999507e-3f));
    p = fma(p, r, Vec::all(8.3334519073e-3f));
    p = fma(p, r, Vec::all(4.1665795894e-2f));
    p = fma(p, r, Vec::all(1.6666665459e-1f));
    p = fma(p, r, Vec::all(5.0000001201e-1f));
    p = fma(p * r, r, r) + Vec::all(1.0f);
    const Vec y = scale_exponent(p, n);
    return select_less(high, x, Vec::all(kInfinity), select_less(x, low, Vec::zero(), y));
}

// The same polynomial for one float, so that a scalar tail rounds as the vector does.
inline float exp(float x) {
    float lanes[Vec::width];
    exp(Vec::all(x)).store(lanes);
    return lanes[0];
}

// Dot product of n elements, four accumulators deep; the order of summation depends on n alone.
template <class A, class B>
inline float dot(const A* a, const B* b, int64_t n) {
    constexpr int W = Vec::width;
    Vec s0 = Vec::zero(), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        s0 = fma(Vec::load(a + i), Vec::load(b + i), s0);
        s1 = fma(Vec::load(a + i + W), Vec::load(b + i + W), s1);
        s2 = fma(Vec::load(a + i + 2 * W), Vec::load(b + i + 2 * W), s2);
        s3 = fma(Vec::load(a + i + 3 * W), Vec::load(b + i + 3 * W), s3);
    }
    for (; i + W <= n; i += W) s0 = fma(Vec::load(a + i), Vec::load(b + i), s0);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        s1 = fma(Vec::load(a + i, rest), Vec::load(b + i, rest), s1);
    }
    return reduce_add((s0 + s1) + (s2 + s3));
}

TTS_END_ISA
