#pragma once

#include "args/linear.h"
#include "args/linear_quantized.h"
#include "integers.h"
#include "stream.h"

namespace tts::cuda {

// Columns of x that are summed by themselves; their sums are added in ascending order. On tensor cores a
// chunk begins by waiting for its first slice, so it is long; sums in float32 stay more exact in short ones.
// An even number of QuantizedTile's slices.
TTS_HD constexpr int64_t linear_chunk(DType dtype) { return dtype == DType::f32 ? 256 : 1024; }

// Blocks that share a tile's depth, a chunk each, where rows are few. Each leaves its sums in `parts`
// [splits, T, N].
inline int64_t linear_splits(int64_t rows, int64_t depth, DType dtype) {
    return rows <= 16 && depth > linear_chunk(dtype) ? divide_up(depth, linear_chunk(dtype)) : 1;
}

// args.weight is [N, K] of x's type. `cut` and the workspaces of both are the CPU's.
void linear(const LinearArgs& args, float* parts, cudaStream_t stream);
void linear(const LinearQuantizedArgs& args, float* parts, cudaStream_t stream);

}  // namespace tts::cuda
