// Register tiles of the product C = X W^T over packed operands, float32 sums.
//
//   rows     [steps][values][R]: R <= kFloatRows rows of X; the values of one step are next to each other
//   weights  panels of 16 rows of W, [steps][16][elements]
//
// A step is one element of the depth K, or two in bfloat16, which `vdpbf16ps` multiplies at once. If the
// depth is odd, a zero is added. The layout of the weights is the same for every instruction set. The layout
// of the rows is not, because they are packed for each call. A value of a row has 32 bits: the pair of a step
// if there is bfloat16 arithmetic, else one element in float32.
//
// A tile holds R x (16 P) sums in registers, for P panels. Each sum is one chain over the depth, in order,
// cut at multiples of kChain steps: it depends neither on the tile's shape nor on the other rows.
#pragma once

#include <cstdint>

#include "ahead.h"
#include "isa.h"
#include "vec_math.h"

namespace tts {

inline constexpr int kPanel = 16;

// Number of elements of the depth in one step.
template <class T>
inline constexpr int kStep = 1;
template <>
inline constexpr int kStep<bf16> = 2;

}  // namespace tts

TTS_BEGIN_ISA

// The number of steps that are summed in one chain before they are added to the total. Short chains keep the
// rounding of float32 small. For 16-bit types it is far below the rounding of the inputs.
template <class T>
inline constexpr int64_t kChain = sizeof(T) == 4 ? 128 : 1024;

// The rows of a tile, by the number of registers, and the number of panels. If arithmetic limits the speed,
// about 24 sums hide its latency, and a value that is broadcast from memory should meet at least two vectors
// of weights. With few rows memory limits the speed, and it is fastest as one stream.
#if defined(__AVX512F__)
inline constexpr int kFloatRows = 14;
inline constexpr int float_panels(int rows) { return rows <= 6 ? 1 : rows <= 9 ? 3 : 2; }
#elif defined(__AVX2__)
inline constexpr int kFloatRows = 6;
inline constexpr int float_panels(int rows) { return rows <= 2 ? 2 : 1; }
#else
inline constexpr int kFloatRows = 2;
inline constexpr int float_panels(int) { return 1; }
#endif

// One step, by the type of the weights: values of a row, a vector of weights, and sums + row * weights.
// `values` has the first value of row i at i, and the second one R floats later.
template <class T>
struct FloatStep {
    static constexpr int values = 1;
    using Weights = Vec;
    // Vec::width values of a row from x on. If `left` is smaller, zeros follow the last elements.
    static Vec load_values(const T* x, int64_t left) {
        return left >= Vec::width ? Vec::load(x) : Vec::load(x, left > 0 ? static_cast<int>(left) : 0);
    }
    static Weights load(const T* w) { return Vec::load(w); }
    template <int R>
    static Vec add(const float* value, Weights w, Vec sums) {
        return fma(Vec::all(*value), w, sums);
    }
};

#if defined(__AVX512BF16__)

template <>
struct FloatStep<bf16> {
    static constexpr int values = 1;
    using Weights = __m512bh;
    static Vec load_values(const bf16* x, int64_t left) {
        if (left >= 2 * Vec::width) return {_mm512_loadu_ps(x)};
        const __mmask32 mask = left > 0 ? (1u << left) - 1u : 0u;
        return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, x))};
    }
    static Weights load(const bf16* w) { return reinterpret_cast<Weights>(_mm512_loadu_si512(w)); }
    template <int R>
    static Vec add(const float* pair, Weights w, Vec sums) {
        return {_mm512_dpbf16_ps(sums.v, reinterpret_cast<Weights>(_mm512_set1_ps(*pair)), w)};
    }
};

#else

// Without bfloat16 arithmetic, the two halves of a 32-bit lane become two vectors, the low half by a shift
// and the high half by a mask, and are multiplied with two values of the row.
template <>
struct FloatStep<bf16> {
    static constexpr int values = 2;
    struct Weights {
        Vec low, high;
    };
    static Vec load_values(const bf16* x, int64_t left) {
        return left >= Vec::width ? Vec::load(x) : Vec::load(x, left > 0 ? static_cast<int>(left) : 0);
    }
    static Weights load(const bf16* w) {
#if defined(__AVX512F__)
        const __m512i pairs = _mm512_loadu_si512(w), high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
        return {{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))},
                { _mm512_castsi512_ps(_mm512_and_si512(pairs, high)) }};
#elif defined(__AVX2__)
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
        const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        return {{_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))},
                { _mm256_castsi256_ps(_mm256_and_si256(pairs, high)) }};
#else
        Weights r;
        for (int i = 0; i < Vec::width; ++i) {
            r.low.v[i] = to_float(w[2 * i]);
            r.high.v[i] = to_float(w[2 * i + 1]);
        }
        return r;
#endif
    }
    template <int R>
    static Vec add(const float* value, Weights w, Vec sums) {
        return fma(Vec::all(value[R]), w.high, fma(Vec::all(value[0]), w.low, sums));
    }
};

#endif

// Number of floats in a packed row of `steps` steps.
template <class T>
inline constexpr int64_t packed_row(int64_t steps) {
    return steps * FloatStep<T>::values;
}

// Packs `height` rows of `depth` elements into a tile, in blocks of W x W values, which are transposed.
template <class T>
inline void pack_rows(const T* x, int64_t stride, int64_t height, int64_t depth, int64_t steps, float* tile) {
    constexpr int W = Vec::width, elements = kStep<T> / FloatStep<T>::values;
    float from[W * W], to[W * W];
    const int64_t count = packed_row<T>(steps);
    for (int64_t value = 0; value < count; value += W) {
        const int64_t values = count - value < W ? count - value : W, k = value * elements;
        for (int64_t row = 0; row < height; row += W) {
            const int rows = height - row < W ? static_cast<int>(height - row) : W;
            for (int i = 0; i < rows; ++i) {
                FloatStep<T>::load_values(x + (row + i) * stride + k, depth - k).store(from + i * W);
            }
            transpose(from, W, to, W);
            float* out = tile + value * height + row;
            for (int64_t j = 0; j < values; ++j) {
                const Vec v = Vec::load(to + j * W);
                rows == W ? v.store(out + j * height) : v.store(out + j * height, rows);
            }
        }
    }
}

// sums [R][P][16] = rows . panels over all steps; `panel` is the distance of panels in elements.
template <class T, int R, int P>
inline void float_tile(const float* rows, const T* weights, int64_t panel, int64_t steps, Ahead ahead,
                       float* sums) {
    using Step = FloatStep<T>;
    constexpr int V = kPanel / Vec::width;  // vectors in a panel
    for (int64_t begin = 0; begin < steps || begin == 0; begin += kChain<T>) {
        const int64_t end = begin + kChain<T> < steps ? begin + kChain<T> : steps;
        Vec acc[R][P * V];
        for (int i = 0; i < R; ++i) {
            for (int v = 0; v < P * V; ++v) acc[i][v] = Vec::zero();
        }
        for (int64_t s = begin; s < end; ++s) {
            typename Step::Weights w[P * V];
            ahead.fetch(s);
#pragma GCC unroll 32
            for (int v = 0; v < P * V; ++v) {
                w[v] = Step::load(weights + (v / V) * panel + (s * kPanel + (v % V) * Vec::width) * kStep<T>);
            }
            const float* value = rows + s * Step::values * R;
#pragma GCC unroll 32
            for (int i = 0; i < R; ++i) {
#pragma GCC unroll 32
                for (int v = 0; v < P * V; ++v) {
                    acc[i][v] = Step::template add<R>(value + i, w[v], acc[i][v]);
                }
            }
        }
        for (int i = 0; i < R; ++i) {
            for (int v = 0; v < P * V; ++v) {
                float* sum = sums + (i * P * V + v) * Vec::width;
                (begin ? Vec::load(sum) + acc[i][v] : acc[i][v]).store(sum);
            }
        }
    }
}

TTS_END_ISA
