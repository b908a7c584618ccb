// C = A B^T in float32, for a block of rows of A that stays in cache while B is read.
//
//   A [rows, depth] activations, B [cols, depth] weights as a checkpoint stores them (torch.nn.Linear),
//   C [rows, cols]
//
// Both operands are contiguous along `depth`, the direction of reading, so neither is packed. A register tile
// holds one vector of partial sums for each of kDotRows x kDotCols outputs, and sums its lanes once, at the
// end. One step of the tile loads 4 + 6 vectors for 24 multiply-adds. A tile of B (6 rows) is read once and
// stays in L1 while all rows of A are processed.
//
// The order of summation of an output depends only on `depth`, not on its tile. So a row's result does not
// depend on other rows, to the bit.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"
#include "vec.h"

TTS_BEGIN_ISA

// ---- one step of a dot product ----------------------------------------------------------------------------

// Multiplies `width` elements of both operands and adds to a vector of float32 sums.
template <class A, class B>
struct DotStep {
    static constexpr int width = Vec::width;
    using Operand = Vec;
    template <class T>
    static Vec load(const T* p) {
        return Vec::load(p);
    }
    template <class T>
    static Vec load(const T* p, int n) {
        return Vec::load(p, n);
    }
    static Vec add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)

// 32 bfloat16 pairs at once: lane i sums elements 2i and 2i + 1.
template <>
struct DotStep<bf16, bf16> {
    static constexpr int width = 32;
    using Operand = __m512bh;
    static __m512bh load(const bf16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
    static __m512bh load(const bf16* p, int n) {
        const __mmask32 lanes = static_cast<__mmask32>((uint64_t{1} << n) - 1);
        return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(lanes, p));
    }
    static Vec add(__m512bh a, __m512bh b, Vec sum) { return {_mm512_dpbf16_ps(sum.v, a, b)}; }
};

#endif

// ---- the register tile ------------------------------------------------------------------------------------

#if defined(__AVX512F__)
inline constexpr int kDotRows = 4, kDotCols = 6;  // 24 of 32 registers hold sums
#elif defined(__AVX2__)
inline constexpr int kDotRows = 4, kDotCols = 3;  // 12 of 16
#else
inline constexpr int kDotRows = 4, kDotCols = 2;  // 8 of 16: products without fused additions need room
#endif

// Lines of memory to fetch into L2, a few at each step of the tiles that are multiplied in the meantime.
struct LinePrefetch {
    const char* line;
    int lines;  // at each step

    void step() {
        for (int l = 0; l < lines; ++l, line += 64) __builtin_prefetch(line, /* for writing */ 0, /* L2 */ 2);
    }
};

// out[r * stride] = the sum of a[r]'s lanes.
template <int N>
inline void reduce_add(const Vec (&a)[N], float* out, int64_t stride) {
    int r = 0;
#if defined(__AVX512F__)
    // Four at once, in the order of reduce_add(Vec): lane i with i + 8, with i + 4, with i + 2, with i + 1.
    for (; r + 4 <= N; r += 4) {
        const auto halves = [](__m512 x, __m512 y) {  // [x's eight sums | y's]
            return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
        };
        const __m512 xy = halves(a[r].v, a[r + 1].v), zw = halves(a[r + 2].v, a[r + 3].v);
        __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(xy, zw, 0x88), _mm512_shuffle_f32x4(xy, zw, 0xdd));
        s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
        s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
        _mm_store_ss(out + r * stride, _mm512_castps512_ps128(s));
        _mm_store_ss(out + (r + 1) * stride, _mm512_extractf32x4_ps(s, 1));
        _mm_store_ss(out + (r + 2) * stride, _mm512_extractf32x4_ps(s, 2));
        _mm_store_ss(out + (r + 3) * stride, _mm512_extractf32x4_ps(s, 3));
    }
#endif
    for (; r < N; ++r) out[r * stride] = reduce_add(a[r]);
}

// c[r][j] = a[r] . b[j] for a full tile; lda, ldb, ldc are elements between rows.
template <int Rows, int Cols, class A, class B>
inline void dot_tile(const A* a, int64_t lda, const B* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
                     LinePrefetch& ahead) {
    using Step = DotStep<A, B>;
    Vec sums[Cols][Rows];
    for (auto& column : sums) {
        for (Vec& sum : column) sum = Vec::zero();
    }
    const auto step = [&](int64_t k, auto... rest) {
        typename Step::Operand x[Rows];
        for (int r = 0; r < Rows; ++r) x[r] = Step::load(a + r * lda + k, rest...);
        for (int j = 0; j < Cols; ++j) {
            const auto y = Step::load(b + j * ldb + k, rest...);
            for (int r = 0; r < Rows; ++r) sums[j][r] = Step::add(x[r], y, sums[j][r]);
        }
        ahead.step();
    };
    int64_t k = 0;
    for (; k + Step::width <= depth; k += Step::width) step(k);
    if (k < depth) step(k, static_cast<int>(depth - k));
    for (int j = 0; j < Cols; ++j) reduce_add<Rows>(sums[j], c + j, ldc);
}

// All rows of A against `Cols` rows of B.
template <int Cols, class A, class B>
inline void dot_panel(const A* a, int64_t lda, int64_t rows, const B* b, int64_t ldb, int64_t depth, float* c,
                      int64_t ldc) {
    const int64_t tile = Cols * ldb * static_cast<int64_t>(sizeof(B)) / 64;  // lines of the next tile of B
    const int64_t steps = (rows + kDotRows - 1) / kDotRows * (depth / DotStep<A, B>::width + 1);
    LinePrefetch ahead{reinterpret_cast<const char*>(b + Cols * ldb),
                       static_cast<int>((tile + steps - 1) / steps)};
    int64_t i = 0;
    for (; i + kDotRows <= rows; i += kDotRows) {
        dot_tile<kDotRows, Cols>(a + i * lda, lda, b, ldb, depth, c + i * ldc, ldc, ahead);
    }
    a += i * lda;
    c += i * ldc;
    switch (rows - i) {
        case 3:
            return dot_tile<3, Cols>(a, lda, b, ldb, depth, c, ldc, ahead);
        case 2:
            return dot_tile<2, Cols>(a, lda, b, ldb, depth, c, ldc, ahead);
        case 1:
            return dot_tile<1, Cols>(a, lda, b, ldb, depth, c, ldc, ahead);
        default:
            return;
    }
}

// C [rows, cols] = A [rows, depth] B [cols, depth]^T.
template <class A, class B>
inline void matmul_nt(const A* a, int64_t lda, int64_t rows, const B* b, int64_t ldb, int64_t cols,
                      int64_t depth, float* c, int64_t ldc) {
    int64_t j = 0;
    for (; j + kDotCols <= cols; j += kDotCols) {
        dot_panel<kDotCols>(a, lda, rows, b + j * ldb, ldb, depth, c + j, ldc);
    }
    for (; j < cols; ++j) dot_panel<1>(a, lda, rows, b + j * ldb, ldb, depth, c + j, ldc);
}

// ---- dtypes -----------------------------------------------------------------------------------------------

// Calls f with the typed pointers of A and B. A is float32, or bfloat16 if B is, too. There are few
// activations, so the caller converts other types to float32 first.
template <class F>
inline void visit_operands(FloatArray a, FloatArray b, F f) {
    if (a.dtype == DType::bf16) {
        f(static_cast<const bf16*>(a.data), static_cast<const bf16*>(b.data));
    } else {
        visit(b, [&](const auto* typed) { f(static_cast<const float*>(a.data), typed); });
    }
}

TTS_END_ISA
