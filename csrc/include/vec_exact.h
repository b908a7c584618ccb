// Vector operations for exact arithmetic, in addition to vec.h: fused additions for every instruction set,
// masks, and sums of whole numbers.
#pragma once

#include <cstdint>

#include "isa.h"
#include "vec.h"

TTS_BEGIN_ISA

#if defined(__AVX512F__)

inline Vec fused(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec shift_exponent(Vec p, Vec n) {  // n holds a whole number k in its low bits: p * 2**k
    return {_mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p.v), _mm512_slli_epi32(_mm512_castps_si512(n.v), 23)))};
}

struct Mask {
    __mmask16 m;
    uint32_t bits() const { return m; }
};
inline Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.m | b.m)}; }
inline Mask without(Mask a, Mask b) { return {static_cast<__mmask16>(a.m & ~b.m)}; }
inline Mask greater(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask greater_equal(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
inline Mask equal(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline Mask is_nan(Vec a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }

// The lanes as uint64.
struct Units {
    __m512i low, high;
    static Units zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
    static Units of(Vec w) {
        return {_mm512_cvtps_epi64(_mm512_castps512_ps256(w.v)),
                _mm512_cvtps_epi64(_mm512_extractf32x8_ps(w.v, 1))};
    }
    void add(Units u) {
        low = _mm512_add_epi64(low, u.low);
        high = _mm512_add_epi64(high, u.high);
    }
    void add(Units u, Mask which) {
        low = _mm512_mask_add_epi64(low, static_cast<__mmask8>(which.m), low, u.low);
        high = _mm512_mask_add_epi64(high, static_cast<__mmask8>(which.m >> 8), high, u.high);
    }
    Units where(Mask keep) const {
        return {_mm512_maskz_mov_epi64(static_cast<__mmask8>(keep.m), low),
                _mm512_maskz_mov_epi64(static_cast<__mmask8>(keep.m >> 8), high)};
    }
    void store(uint64_t* p) const {
        _mm512_storeu_si512(p, low);
        _mm512_storeu_si512(p + 8, high);
    }
    uint64_t sum() const {
        return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high)));
    }
};

// Writes the lanes of x that are set in `where` to out. It writes whole vectors, so out needs room for
// Vec::width elements.
inline int64_t compress(Vec x, Mask where, float* out) {
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(where.m, x.v));
    return __builtin_popcount(where.m);
}

#elif defined(__AVX2__)

inline Vec fused(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec shift_exponent(Vec p, Vec n) {
    return {_mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p.v), _mm256_slli_epi32(_mm256_castps_si256(n.v), 23)))};
}

struct Mask {
    __m256 m;
    uint32_t bits() const { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
};
inline Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
inline Mask without(Mask a, Mask b) { return {_mm256_andnot_ps(b.m, a.m)}; }
inline Mask greater(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask greater_equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
inline Mask equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline Mask is_nan(Vec a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }

struct Units {
    __m256i low, high;
    static Units zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Units of(Vec w) {
        return {whole(_mm256_castps256_ps128(w.v)), whole(_mm256_extractf128_ps(w.v, 1))};
    }
    void add(Units u) {
        low = _mm256_add_epi64(low, u.low);
        high = _mm256_add_epi64(high, u.high);
    }
    void add(Units u, Mask which) { add(u.where(which)); }
    Units where(Mask keep) const {
        const __m256i m = _mm256_castps_si256(keep.m);
        return {_mm256_and_si256(low, _mm256_cvtepi32_epi64(_mm256_castsi256_si128(m))),
                _mm256_and_si256(high, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(m, 1)))};
    }
    void store(uint64_t* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 4), high);
    }
    uint64_t sum() const {
        uint64_t lanes[8];
        store(lanes);
        return (lanes[0] + lanes[1] + lanes[2] + lanes[3]) + (lanes[4] + lanes[5] + lanes[6] + lanes[7]);
    }

    // Adding 2**52 leaves the whole number in the mantissa of a double.
    static __m256i whole(__m128 w) {
        const __m256d magic = _mm256_set1_pd(0x1p52);
        const __m256d shifted = _mm256_add_pd(_mm256_cvtps_pd(w), magic);
        return _mm256_xor_si256(_mm256_castpd_si256(shifted), _mm256_castpd_si256(magic));
    }
};

inline int64_t compress(Vec x, Mask where, float* out) {
    float lanes[Vec::width];
    x.store(lanes);
    int64_t n = 0;
    for (uint32_t bits = where.bits(); bits; bits &= bits - 1) out[n++] = lanes[__builtin_ctz(bits)];
    return n;
}

#else

typedef double Doubles __attribute__((vector_size(32)));
typedef uint64_t Words __attribute__((vector_size(32)));
typedef int64_t SignedWords __attribute__((vector_size(32)));

// a * b is exact in float64. The sum is rounded to odd (Boldo and Melquiond, 2008), so that rounding it again
// to float32 gives the result of a fused operation.
inline Vec fused(Vec a, Vec b, Vec c) {
    const Doubles x = __builtin_convertvector(a.v, Doubles) * __builtin_convertvector(b.v, Doubles);
    const Doubles y = __builtin_convertvector(c.v, Doubles);
    const Doubles s = x + y, part = s - x,
                  error = (x - (s - part)) + (y - part);  // two-sum: s + error = x + y
    SignedWords bits;
    __builtin_memcpy(&bits, &s, sizeof bits);
    const SignedWords inexact_even = (error != 0.0) & ((bits & 1) == 0);  // -1 where true
    const SignedWords away = (error > 0.0) == (s > 0.0);                  // the sum's magnitude is above |s|
    bits += inexact_even & ((away & 2) - 1);
    Doubles odd;
    __builtin_memcpy(&odd, &bits, sizeof odd);
    return {__builtin_convertvector(odd, Vec::floats)};
}
inline Vec shift_exponent(Vec p, Vec n) {
    typedef uint32_t Bits __attribute__((vector_size(16)));
    Bits x, k;
    __builtin_memcpy(&x, &p.v, sizeof x);
    __builtin_memcpy(&k, &n.v, sizeof k);
    x += k << 23;
    __builtin_memcpy(&p.v, &x, sizeof x);
    return p;
}

struct Mask {
    Vec::ints m;  // -1 where set
    uint32_t bits() const { return static_cast<uint32_t>((m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8)); }
};
inline Mask operator|(Mask a, Mask b) { return {a.m | b.m}; }
inline Mask without(Mask a, Mask b) { return {a.m & ~b.m}; }
inline Mask greater(Vec a, Vec b) { return {a.v > b.v}; }
inline Mask greater_equal(Vec a, Vec b) { return {a.v >= b.v}; }
inline Mask equal(Vec a, Vec b) { return {a.v == b.v}; }
inline Mask is_nan(Vec a) { return {a.v != a.v}; }

struct Units {
    Words u;
    static Units zero() { return {Words{}}; }
    static Units of(Vec w) {
        const Doubles shifted = __builtin_convertvector(w.v, Doubles) + 0x1p52;
        Words bits;
        __builtin_memcpy(&bits, &shifted, sizeof bits);
        return {bits ^ 0x4330000000000000u};
    }
    void add(Units x) { u += x.u; }
    void add(Units x, Mask which) { add(x.where(which)); }
    Units where(Mask keep) const { return {u & (Words) __builtin_convertvector(keep.m, SignedWords)}; }
    void store(uint64_t* p) const { __builtin_memcpy(p, &u, sizeof u); }
    uint64_t sum() const { return (u[0] + u[1]) + (u[2] + u[3]); }
};

inline int64_t compress(Vec x, Mask where, float* out) {
    int64_t n = 0;
    for (int i = 0; i < Vec::width; ++i) {
        if (where.m[i]) out[n++] = x.v[i];
    }
    return n;
}

#endif

TTS_END_ISA
