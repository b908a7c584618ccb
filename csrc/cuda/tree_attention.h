#pragma once

#include "args/tree_attention.h"
#include "stream.h"

namespace tts::cuda {

// The largest head size.
inline constexpr int64_t kMaxHeadDim = 1024;

// Lanes (rows x query heads of a KV head) of a tile at most.
inline constexpr int64_t kOwnLanes = 64;

// Thread blocks of the first launch, for a plan whose tables have room for max_tasks: no more than the device
// runs at once.
int64_t tree_attention_blocks(const TreeAttentionArgs& args, int64_t max_tasks);

// Attention, then the merge of what several tasks have read: two launches. `args` as on the CPU, all pointers
// to the device; own: workspace [blocks, kOwnLanes, D].
void tree_attention(const TreeAttentionArgs& args, const PlanSizes* sizes, float* own, int64_t blocks,
                    cudaStream_t stream);

}  // namespace tts::cuda
