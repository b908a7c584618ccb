#pragma once

#include "args/tree_attention.h"
#include "stream.h"

namespace tts::cuda {

// The largest head size.
inline constexpr int64_t kMaxHeadDim = 1024;

// Attention, then the merge of what several tasks have read: two launches. `args` as on the CPU, all pointers
// to the device; `sizes` are the plan's, whose tables have room for max_tasks.
void tree_attention(const TreeAttentionArgs& args, const PlanSizes* sizes, int64_t max_tasks,
                    cudaStream_t stream);

}  // namespace tts::cuda
