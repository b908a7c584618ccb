// c = a b^T by one block: a tile of kRows rows of a times 128 rows of b, over the whole width.
//
// Four warps lie side by side, 32 columns each, for every kRows, and the width is processed in order. So an
// element of c, and every sum over a row of c, is the same in a tile of 16 rows as in one of 64.
//
//   TensorTile: bfloat16 or float16 of one type, rows at multiples of 16 bytes. Slices of 64 columns are
//   copied by cp.async into a ring of shared memory, 4 x 18 KB or 3 x 24 KB, for the tensor cores.
//   ScalarTile: everything else, in float32.
//
// Both leave c in registers in the same layout: see ProductTile.
#pragma once

#include "integers.h"
#include "mma.cuh"
#include "reduce.cuh"
#include "vector.cuh"

namespace tts::cuda {

inline constexpr int kTileCols = 128, kTileThreads = 128;

// The layout of a thread's elements of c: c[i][j][e] is at row(i, e / 2), column col(j, e % 2).
template <int kRows>
struct ProductTile {
    static constexpr int kDown = kRows / 16, kAcross = 4;
    float c[kDown][kAcross][4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
#pragma unroll
            for (int j = 0; j < kAcross; ++j) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0.0f;
        }
    }
    __device__ void add(const ProductTile& other) {
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
#pragma unroll
            for (int j = 0; j < kAcross; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) c[i][j][e] = __fadd_rn(c[i][j][e], other.c[i][j][e]);
            }
        }
    }
    // f(row, column, element) for each of the thread's elements.
    template <class F>
    __device__ void each(F f) const {
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
#pragma unroll
            for (int j = 0; j < kAcross; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) f(row(i, e / 2), col(j, e % 2), c[i][j][e]);
            }
        }
    }
    __device__ static int row(int i, int half) { return i * 16 + half * 8 + lane() / 4; }
    __device__ static int col(int j, int e) { return warp() * 32 + j * 8 + lane() % 4 * 2 + e; }
};

// ---- tensor cores -----------------------------------------------------------------------------------------

template <class T, int kRows>
struct TensorTile : ProductTile<kRows> {
    using ProductTile<kRows>::c;
    static constexpr int kDepth = 64, kStages = kRows == 16 ? 4 : 3;  // a row of a slice is 128 bytes
    static constexpr int kSlice = (kRows + kTileCols) * kDepth * sizeof(T);
    static constexpr int kSharedBytes = kStages * kSlice;

    // a(row) and b(row): pointers to rows; null for rows that do not exist and count as 0.
    template <class A, class B>
    __device__ __forceinline__ void multiply(A a, B b, int64_t width, void* shared) {
        const int slices = static_cast<int>(divide_up(width, kDepth));
        uint8_t* ring = static_cast<uint8_t*>(shared);
        const auto fetch = [&](int slice) {
            if (slice < slices) {
                uint8_t* to = ring + slice % kStages * kSlice;
                fetch_rows<kRows>(a, slice, width, to);
                fetch_rows<kTileCols>(b, slice, width, to + kRows * 128);
            }
            close_copies();
        };
        for (int s = 0; s < kStages - 1; ++s) fetch(s);
        for (int s = 0; s < slices; ++s) {
            wait_copies<kStages - 2>();
            __syncthreads();  // slice s has arrived, and slice s - 1 is no longer needed
            fetch(s + kStages - 1);
            use(ring + s % kStages * kSlice);
        }
        __syncthreads();
    }

  protected:
    // The place of the 16-byte piece `chunk` of a row, permuted so that eight rows' pieces lie in different
    // banks.
    __device__ static int place(int row, int chunk) { return row * 128 + ((chunk ^ row) & 7) * 16; }

    template <int kCount, class Rows>
    __device__ static void fetch_rows(Rows rows, int slice, int64_t width, uint8_t* to) {
        constexpr int kEach = 16 / sizeof(T);
        const int chunk = threadIdx.x % 8;
        const int64_t first = int64_t{slice} * kDepth + chunk * kEach;
        const int64_t rest = (width - first) * static_cast<int64_t>(sizeof(T));
        const int bytes = static_cast<int>(rest < 0 ? 0 : rest < 16 ? rest : 16);
#pragma unroll
        for (int i = 0; i < kCount; i += kTileThreads / 8) {
            const int row = i + static_cast<int>(threadIdx.x) / 8;
            const T* p = rows(row);
            const bool there = p != nullptr && bytes > 0;
            copy_async(to + place(row, chunk), there ? p + first : rows(0), there ? bytes : 0);
        }
    }

    __device__ __forceinline__ void use(const uint8_t* slice) {
        const uint8_t* cols = slice + (kRows + warp() * 32) * 128;
        const int l = lane();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
            uint32_t a[ProductTile<kRows>::kDown][4], b[2][4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                load_matrices(b[j], cols + place(j * 16 + l % 8 + l / 16 * 8, k * 2 + l / 8 % 2));
            }
#pragma unroll
            for (int i = 0; i < ProductTile<kRows>::kDown; ++i) {
                load_matrices(a[i], slice + place(i * 16 + l % 16, k * 2 + l / 16));
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    mma<T>(c[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
};

// ---- float32 ----------------------------------------------------------------------------------------------

template <int kRows>
struct ScalarTile : ProductTile<kRows> {
    using ProductTile<kRows>::c;
    static constexpr int kDepth = 32, kStride = kDepth + 4;  // so that eight rows lie in different banks
    static constexpr int kSharedBytes = (kRows + kTileCols) * kStride * sizeof(float);

    // a(row, column) and b(row, column): elements inside the width; 0 for rows that do not exist.
    template <class A, class B>
    __device__ __forceinline__ void multiply(A a, B b, int64_t width, void* shared) {
        float* rows = static_cast<float*>(shared);
        float* cols = rows + kRows * kStride;
        for (int64_t first = 0; first < width; first += kDepth) {
            fetch<kRows>(a, first, width, rows);
            fetch<kTileCols>(b, first, width, cols);
            __syncthreads();
            use(rows, cols);
            __syncthreads();
        }
    }

  private:
    template <int kCount, class Elements>
    __device__ static void fetch(Elements elements, int64_t first, int64_t width, float* to) {
        const int64_t k = first + lane();
#pragma unroll 4
        for (int row = warp(); row < kCount; row += kTileThreads / kWarp) {
            to[row * kStride + lane()] = k < width ? elements(row, k) : 0.0f;
        }
    }

    __device__ __forceinline__ void use(const float* rows, const float* cols) {
#pragma unroll 2
        for (int k = 0; k < kDepth; k += 4) {
            float b[4][2][4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) load(cols + this->col(j, e) * kStride + k, b[j][e]);
            }
#pragma unroll
            for (int i = 0; i < 2 * ProductTile<kRows>::kDown; ++i) {
                float a[4];
                load(rows + this->row(i / 2, i % 2) * kStride + k, a);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float& sum = c[i / 2][j][i % 2 * 2 + e];
#pragma unroll
                        for (int step = 0; step < 4; ++step) sum = fmaf(a[step], b[j][e][step], sum);
                    }
                }
            }
        }
    }
};

}  // namespace tts::cuda
