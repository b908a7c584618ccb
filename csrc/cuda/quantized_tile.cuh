// matmul_nt.cuh's TensorTile for a weight of whole numbers of 8 or 4 bits in panels (int_tile.h). A slice of
// the weight is converted to float on its way into shared memory, and rounded to T like the rows of x. While
// one slice is multiplied, the next one is being loaded: the weight's into registers, x's by cp.async.
#pragma once

#include "args/linear_quantized.h"
#include "matmul_nt.cuh"

namespace tts::cuda {

inline constexpr int kPanelCols = 16;  // columns of a panel; 4 of the depth lie next to each other

// The value of a stored number.
__device__ inline float dequantized(uint32_t stored, int half, float zero, float scale) {
    return __fmul_rn(__fsub_rn(static_cast<float>(static_cast<int>(stored) - half), zero), scale);
}

// One weight.
__device__ inline float dequantized(const QuantizedWeight& weight, int64_t column, int64_t k) {
    const int64_t panel = column / kPanelCols, in_panel = column % kPanelCols, step = k / 4;
    const int64_t line = weight.bits == 8 ? step : step / 2, lines = weight.depth * weight.bits / 32;
    const uint32_t byte = weight.data[((panel * lines + line) * kPanelCols + in_panel) * 4 + k % 4];
    const uint32_t stored = weight.bits == 8 ? byte : step % 2 ? byte >> 4 : byte & 15;
    const int64_t group = (panel * weight.groups + k / weight.group) * kPanelCols + in_panel;
    return dequantized(stored, 1 << (weight.bits - 1), weight.zero ? weight.zero[group] : 0.0f,
                       weight.scale[group]);
}

// 16 bytes of a slice of a panel: 4 columns, times 4 elements of the depth in 8 bits, or 8 in 4 bits.
// Neighbouring threads of a warp read neighbouring pieces.
template <int kBits>
struct PanelPiece {
    static constexpr int kLines = 64 * kBits / 32;
    static constexpr int kCount = kTileCols / kPanelCols * kLines * 4 / kTileThreads;  // for each thread
    int panel, line, quad;

    __device__ explicit PanelPiece(int i) {
        const int index = static_cast<int>(threadIdx.x) + i * kTileThreads;
        panel = index / (kLines * 4), line = index / 4 % kLines, quad = index % 4;
    }
};

// The weight from column `column` and element `k` of the depth on.
template <int kBits>
struct PanelSlice {
    const QuantizedWeight& weight;
    int column, columns, k;  // there are fewer than 2**31 scales

    __device__ int panel(PanelPiece<kBits> piece) const { return column / kPanelCols + piece.panel; }
    __device__ bool has(PanelPiece<kBits> piece) const { return panel(piece) * kPanelCols < columns; }

    // The stored numbers; zeros after the last panel.
    __device__ uint4 load(PanelPiece<kBits> piece) const {
        if (!has(piece)) return {};
        const int lines = static_cast<int>(weight.depth) * kBits / 32;
        const int64_t line = int64_t{panel(piece)} * lines + k * kBits / 32 + piece.line;
        return *reinterpret_cast<const uint4*>(weight.data + (line * 4 + piece.quad) * 16);
    }

    // One of `values` for each of the piece's columns; zeros for columns that do not exist.
    __device__ float4 of_group(const float* values, PanelPiece<kBits> piece) const {
        if (!values || !has(piece)) return {};
        const int group = (k + piece.line * (32 / kBits)) / static_cast<int>(weight.group);
        const int first = panel(piece) * static_cast<int>(weight.groups) + group;
        return *reinterpret_cast<const float4*>(values + first * int64_t{kPanelCols} + piece.quad * 4);
    }
};

template <class T, int kRows, int kBits>
struct QuantizedTile : TensorTile<T, kRows> {
    using Tile = TensorTile<T, kRows>;
    static constexpr int kStages = 2, kSlice = Tile::kSlice, kSharedBytes = kStages * kSlice;

    // a(row) is as in TensorTile, for columns [first_k, first_k + width); `column` is the weight's first
    // column. A second call may follow directly if the width of the first has an even number of slices: its
    // first slice then uses the stage before the last one.
    template <class A>
    __device__ __forceinline__ void multiply(A a, const QuantizedWeight& weight, int64_t column,
                                             int64_t columns, int64_t first_k, int64_t width, void* shared) {
        constexpr int kCount = PanelPiece<kBits>::kCount;
        const int slices = static_cast<int>(divide_up(width, Tile::kDepth));
        uint8_t* ring = static_cast<uint8_t*>(shared);
        const auto slice_of = [&](int s) {
            return PanelSlice<kBits>{weight, static_cast<int>(column), static_cast<int>(columns),
                                     static_cast<int>(first_k) + s * Tile::kDepth};
        };
        uint4 stored[kCount];
        const auto fetch = [&](int s) {
            if (s >= slices) return;
            Tile::template fetch_rows<kRows>(a, s, width, ring + s % kStages * kSlice);
            close_copies();
#pragma unroll
            for (int i = 0; i < kCount; ++i) stored[i] = slice_of(s).load(PanelPiece<kBits>(i));
        };
        fetch(0);
        for (int s = 0; s < slices; ++s) {
            uint8_t* slice = ring + s % kStages * kSlice;
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                put(stored[i], slice_of(s), PanelPiece<kBits>(i), slice + kRows * 128);
            }
            wait_copies<0>();
            __syncthreads();  // slice s has arrived, and slice s - 1 is no longer needed
            fetch(s + 1);
            this->use(slice);
        }
    }

  private:
    __device__ static void put(uint4 piece, PanelSlice<kBits> from, PanelPiece<kBits> at, uint8_t* cols) {
        const float4 scales = from.of_group(from.weight.scale, at),
                     zeros = from.of_group(from.weight.zero, at);
        const uint32_t stored[4] = {piece.x, piece.y, piece.z, piece.w};
        const float scale[4] = {scales.x, scales.y, scales.z, scales.w};
        const float zero[4] = {zeros.x, zeros.y, zeros.z, zeros.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int column = at.panel * kPanelCols + at.quad * 4 + c;
            if constexpr (kBits == 8) {
                uint8_t* to = cols + Tile::place(column, at.line / 2) + at.line % 2 * 8;
                *reinterpret_cast<uint2*>(to) = floats(stored[c], zero[c], scale[c]);
            } else {
                const uint2 even = floats(stored[c] & 0x0f0f0f0f, zero[c], scale[c]);
                const uint2 odd = floats(stored[c] >> 4 & 0x0f0f0f0f, zero[c], scale[c]);
                *reinterpret_cast<uint4*>(cols + Tile::place(column, at.line)) = {even.x, even.y, odd.x,
                                                                                  odd.y};
            }
        }
    }

    // The numbers in four bytes, converted to T.
    __device__ static uint2 floats(uint32_t bytes, float zero, float scale) {
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            x[e] = dequantized(bytes >> (8 * e) & 255, 1 << (kBits - 1), zero, scale);
        }
        return {pack<T>(x[0], x[1]), pack<T>(x[2], x[3])};
    }
};

}  // namespace tts::cuda
