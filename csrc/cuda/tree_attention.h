#pragma once

#include "args/tree_attention.h"
#include "stream.h"

namespace tts::cuda {

// The largest head size.
inline constexpr int64_t kMaxHeadDim = 1024;

// The largest number of lanes (rows x query heads of a KV head) of a task, unless a single row has more query
// heads: the planner's max_query_rows for GPUs. Blocks of eight warps run all of them at once, blocks of four
// a half.
inline constexpr int kTaskLanes = 128, kHalfLanes = kTaskLanes / 2;

// The number of items of `lanes` lanes each, for one task and KV head.
TTS_HD inline int64_t task_parts(const TreeAttentionArgs& args, int64_t lanes) {
    return args.num_rows * (args.num_q_heads / args.num_kv_heads) > lanes ? kTaskLanes / lanes : 1;
}

struct TreeAttentionGrid {
    int64_t blocks, lanes;  // of a block: kTaskLanes or kHalfLanes
};

// The grid of the first launch, for a plan whose tables have room for max_tasks. It has no more blocks than
// the device can run at once.
TreeAttentionGrid tree_attention_grid(const TreeAttentionArgs& args, int64_t max_tasks);

// Runs attention, then merges the results of several tasks: two launches. `args` is as on the CPU, with
// pointers to the device; own: workspace [blocks, lanes, D] for the grid.
void tree_attention(const TreeAttentionArgs& args, const PlanSizes* sizes, float* own,
                    const TreeAttentionGrid& grid, cudaStream_t stream);

}  // namespace tts::cuda
