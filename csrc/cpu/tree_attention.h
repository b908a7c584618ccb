#pragma once

#include <cstdint>

#include "args/tree_attention.h"
#include "isa.h"

namespace tts {

inline constexpr int64_t kRowAlign = 32;  // floats: two vectors of any instruction set

// The unit of work: a task for some KV heads, which are read together. Their number changes no result.
struct WorkItem {
    int32_t task, head_begin, head_end;
};

}  // namespace tts

TTS_BEGIN_ISA

// The number of floats of scratch that one thread needs for tasks of at most `lanes` = rows x group, which
// keep at most `states` = lanes x heads states in the task.
int64_t tree_attention_scratch(int64_t lanes, int64_t num_kv_heads, int64_t states, int64_t head_dim,
                               bool quantized);

// scratch: 64-byte aligned.
void tree_attention(const TreeAttentionArgs& args, WorkItem item, float* scratch);

// Second pass for rows [begin, end): merges the partial states of rows, and writes the results of rows
// without keys. scratch: 2 x padded_dim floats.
void tree_attention_merge(const TreeAttentionArgs& args, int64_t begin, int64_t end, float* scratch);

TTS_END_ISA
