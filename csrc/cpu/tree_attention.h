#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace tts {

// One of the two caches, [pages, page_size, kv_heads, head_dim]; strides in elements, the last one is 1.
struct PagedCache {
    const void* data;
    int64_t page_stride, token_stride, head_stride;
};

// The rows of the plan's int32 tables (tts_kernels/plan.py).
struct Segment {
    int32_t page_begin, start, length, row_begin, row_end;
};
struct Task {
    int32_t seg_begin, seg_end, row_begin, row_end, slot;
};

struct TreeAttentionArgs {
    DType dtype;    // of q, both caches and out
    const void* q;  // [T, Hq, D], last dimension contiguous
    int64_t q_row_stride, q_head_stride;
    PagedCache k, v;
    int64_t page_size;
    int64_t num_rows, num_q_heads, num_kv_heads, head_dim;
    const int32_t *rows, *positions, *pages;  // [T] [T] [used], checked
    const Segment* segments;
    const Task* tasks;
    const int32_t *merge_indptr, *merge_slots;
    float scale, softcap;   // softcap 0: none
    int64_t window;         // 0: none
    void* out;              // [T, Hq, D]
    float* lse;             // [T, Hq]
    float* partial_rows;    // [slots, Hq, D] workspace: sum of weights times values
    float* partial_states;  // [slots, Hq, 2] workspace: max (log2), sum
};

}  // namespace tts

TTS_BEGIN_ISA

// Floats of scratch that one thread needs for tasks of at most `lanes` = rows x group.
int64_t tree_attention_scratch(int64_t lanes, int64_t head_dim);

// One work item: task item / num_kv_heads for KV head item % num_kv_heads. scratch: 64-byte aligned.
void tree_attention(const TreeAttentionArgs& args, int64_t item, float* scratch);

// Second pass for rows [begin, end): merges the partials of rows with several, and fills rows with none.
// scratch: head_dim floats, rounded up to 16.
void tree_attention_merge(const TreeAttentionArgs& args, int64_t begin, int64_t end, float* scratch);

TTS_END_ISA
