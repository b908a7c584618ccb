// Heads of keys and values as whole numbers of 8 or 4 bits (KvFormat in paged_cache.h). Each head has its own
// scale.
//
//   int8  scale = max |x| / 127                code = x / scale
//   int4  zero = min x, scale = (max x - min x) / 15      code = (x - zero) / scale
//
// First scale and zero are rounded to float16, then codes to the nearest even whole number. Every step rounds
// as in IEEE 754, so all backends store the same bits. If an element is not finite, or a scale or zero is not
// finite in float16, the scale is NaN, and so is the head. Elements are decoded as code * scale + zero in
// float32.
#pragma once

#include <cstdint>

#include "int_vec.h"
#include "isa.h"
#include "kv_numbers.h"
#include "paged_cache.h"
#include "vec.h"
#include "vec_row.h"

TTS_BEGIN_ISA

// ---- to codes
// ----------------------------------------------------------------------------------------------

template <class T>
inline HeadRange range_of(const T* x, int64_t dim) {
    constexpr int W = Vec::width;
    Vec low = Vec::all(to_float(x[0])), high = low,
        odd = Vec::zero();  // v - v is 0, or NaN if v is not finite
    for_vectors(dim, [&](int64_t i, int n) {
        T filled[W];
        const T* from = x + i;
        if (n < W) {
            for (int j = 0; j < W; ++j) filled[j] = from[j < n ? j : 0];
            from = filled;
        }
        const Vec v = Vec::load(from);
        low = min(v, low), high = max(v, high), odd = odd + (v - v);
    });
    return {0.0f - reduce_max(Vec::zero() - low), reduce_max(high), reduce_add(odd) == 0.0f};
}

// The scale and zero for codes from 0 to `most` over a range.
inline Affine affine_of(const HeadRange& range, float most) {
    return affine_of(range.finite, from_float<f16>((range.high - range.low) / most),
                     from_float<f16>(range.low));
}

// Codes as floats, rounded to whole numbers within [low, high]; 0 if the scale is 0 or NaN.
class Encoder {
  public:
    Encoder(float scale, float zero, float low, float high)
        : some_(scale > 0.0f),
          scale_(Vec::all(scale)),
          zero_(Vec::all(zero)),
          low_(Vec::all(low)),
          high_(Vec::all(high)) {}

    // n codes as bytes, signed or unsigned.
    template <class T, class I>
    void operator()(const T* x, int n, I* to) const {
        const Vec v = some_ ? min(max((load(x, n) - zero_) / scale_, low_), high_) : Vec::zero();
        if (n == Vec::width) return store_rounded(v, to);
        I all[Vec::width];
        store_rounded(v, all);
        __builtin_memcpy(to, all, static_cast<unsigned>(n));
    }

  private:
    bool some_;
    Vec scale_, zero_, low_, high_;
};

// Encodes a head of `dim` elements: its codes, and its scale and zero at `index`.
template <class T>
inline void quantize_head(const T* x, int64_t dim, KvFormat format, char* codes, KvScales to, int64_t index) {
    constexpr int W = Vec::width;
    const HeadRange range = range_of(x, dim);
    if (format == KvFormat::int8) {
        const float top = range.high > 0.0f - range.low ? range.high : 0.0f - range.low;
        const f16 scale = affine_of(range.finite, from_float<f16>(top / kMostInt8), f16{0}).scale;
        to.scale[index] = scale;
        const Encoder encode(to_float(scale), 0.0f, -kMostInt8, kMostInt8);
        for_vectors(dim, [&](int64_t i, int n) { encode(x + i, n, reinterpret_cast<int8_t*>(codes) + i); });
        return;
    }
    const Affine affine = affine_of(range, kMostInt4);
    to.scale[index] = affine.scale, to.zero[index] = affine.zero;
    const Encoder encode(to_float(affine.scale), to_float(affine.zero), 0.0f, kMostInt4);
    const int64_t half = dim / 2;
    for_vectors(half, [&](int64_t i, int n) {
        int8_t low[W], high[W];
        encode(x + i, n, low), encode(x + half + i, n, high);
        for (int j = 0; j < n; ++j) codes[i + j] = static_cast<char>(low[j] | high[j] << 4);
    });
}

// ---- to elements
// -------------------------------------------------------------------------------------------

// Vec::width codes, from the same number of bytes.
struct CodeBytes {
#if defined(__AVX512F__)
    __m128i bytes;
    explicit CodeBytes(const char* p) : bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) {}
    Vec int8() const { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }
    Vec uint8() const { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))}; }
    Vec bits(int shift, int mask) const {
        const __m512i whole = _mm512_srl_epi32(_mm512_cvtepu8_epi32(bytes), _mm_cvtsi32_si128(shift));
        return {_mm512_cvtepi32_ps(_mm512_and_si512(whole, _mm512_set1_epi32(mask)))};
    }
    Vec low() const { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(bytes, nibble())))}; }
    Vec high() const {
        return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(bytes, 4), nibble())))};
    }
    static __m128i nibble() { return _mm_set1_epi8(15); }
#elif defined(__AVX2__)
    __m128i bytes;
    explicit CodeBytes(const char* p) : bytes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))) {}
    Vec int8() const { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))}; }
    Vec uint8() const { return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))}; }
    Vec bits(int shift, int mask) const {
        const __m256i whole = _mm256_srl_epi32(_mm256_cvtepu8_epi32(bytes), _mm_cvtsi32_si128(shift));
        return {_mm256_cvtepi32_ps(_mm256_and_si256(whole, _mm256_set1_epi32(mask)))};
    }
    Vec low() const { return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_and_si128(bytes, nibble())))}; }
    Vec high() const {
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(bytes, 4), nibble())))};
    }
    static __m128i nibble() { return _mm_set1_epi8(15); }
#else
    uint8_t bytes[Vec::width];
    explicit CodeBytes(const char* p) { __builtin_memcpy(bytes, p, sizeof bytes); }
    Vec int8() const {
        return whole([](uint8_t b) { return static_cast<int>(static_cast<int8_t>(b)); });
    }
    Vec uint8() const {
        return whole([](uint8_t b) { return b; });
    }
    Vec bits(int shift, int mask) const {
        return whole([=](uint8_t b) { return b >> shift & mask; });
    }
    Vec low() const {
        return whole([](uint8_t b) { return b & 15; });
    }
    Vec high() const {
        return whole([](uint8_t b) { return b >> 4; });
    }
    template <class F>
    Vec whole(F f) const {
        Vec r;
        for (int i = 0; i < Vec::width; ++i) r.v[i] = static_cast<float>(f(bytes[i]));
        return r;
    }
#endif

    static CodeBytes load(const char* p, int n) {
        if (n == Vec::width) return CodeBytes(p);
        char all[16] = {};
        __builtin_memcpy(all, p, static_cast<unsigned>(n));
        return CodeBytes(all);
    }
};

// Stores two vectors next to each other.
template <class T>
inline void store_two(Vec a, Vec b, T* to) {
    a.store(to), b.store(to + Vec::width);
}
#if defined(__AVX512BF16__)
template <>
inline void store_two(Vec a, Vec b, bf16* to) {
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
}
#elif defined(__AVX512F__)
template <>
inline void store_two(Vec a, Vec b, bf16* to) {
    const auto rounded = [](Vec x) {  // to the nearest even, in the upper half of each lane
        const __m512i bits = _mm512_castps_si512(x.v), quiet = _mm512_set1_epi32(0x00400000);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
        return _mm512_srli_epi32(_mm512_mask_or_epi32(up, nan, bits, quiet), 16);
    };
    const __m512i words = _mm512_packus_epi32(rounded(a), rounded(b));  // by blocks of 128 bits: a b a b ...
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, words));
}
#endif

// n elements from n codes.
template <class T, class Element>
inline void decode(const char* from, int64_t n, T* to, Element element) {
    constexpr int64_t W = Vec::width;
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        store_two(element(CodeBytes(from + i)), element(CodeBytes(from + i + W)), to + i);
    }
    if (i == n) return;
    for_vectors(n - i,
                [&](int64_t j, int m) { store(element(CodeBytes::load(from + i + j, m)), to + i + j, m); });
}

// Decodes a head's elements from its codes.
template <KvFormat kFormat, class T>
inline void dequantize_head(const char* codes, int64_t dim, KvScales from, int64_t index, T* x) {
    const Vec scale = Vec::all(from.scale[index]);
    if constexpr (kFormat == KvFormat::int8) {
        decode(codes, dim, x, [&](CodeBytes b) { return b.int8() * scale; });
    } else {  // the products are exact, so there is one rounding, fused or not
        const Vec zero = Vec::all(from.zero[index]);
        decode(codes, dim / 2, x, [&](CodeBytes b) { return fma(b.low(), scale, zero); });
        decode(codes, dim / 2, x + dim / 2, [&](CodeBytes b) { return fma(b.high(), scale, zero); });
    }
}

TTS_END_ISA
