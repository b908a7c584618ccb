#pragma once

#include "args/linear.h"
#include "args/linear_quantized.h"
#include "integers.h"
#include "stream.h"

namespace tts::cuda {

// The number of columns of x that are summed as one chunk; chunks are added in ascending order. On tensor
// cores a chunk begins by waiting for its first slice, so chunks are long. In float32, short chunks give more
// exact sums. The chunk is an even number of QuantizedTile's slices.
TTS_HD constexpr int64_t linear_chunk(DType dtype) { return dtype == DType::f32 ? 256 : 1024; }

// The number of blocks that share a tile's depth, with one chunk each, if there are few rows. Each block
// stores its sums in `parts` [splits, T, N].
inline int64_t linear_splits(int64_t rows, int64_t depth, DType dtype) {
    return rows <= 16 && depth > linear_chunk(dtype) ? divide_up(depth, linear_chunk(dtype)) : 1;
}

// args.weight is [N, K] of x's type. `cut` and the workspaces in both structs are used only on the CPU.
void linear(const LinearArgs& args, float* parts, cudaStream_t stream);
void linear(const LinearQuantizedArgs& args, float* parts, cudaStream_t stream);

}  // namespace tts::cuda
