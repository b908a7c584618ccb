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
    float scale, softcap;  // softcap 0: none
    int64_t window;        // 0: none
    void* out;             // [T, Hq, D]
    float* lse;            // [T, Hq]
    // Workspace, where a task keeps its states. A row is padded to whole vectors.
    float* partial_rows;    // [slots, Hq, padded_dim]: sum of weights times values
    float* partial_states;  // [slots, Hq, 2]: max (log2), sum
    int64_t padded_dim;     // D rounded up to kRowAlign
};

inline constexpr int64_t kRowAlign = 32;  // floats: two vectors of any instruction set

// Lanes (rows x query heads of a KV head) up to which a segment is bound by reading its keys, not by
// arithmetic.
inline constexpr int64_t kNarrow = 8;

// The unit of work: a task for some KV heads, which are read together. How many go together changes no
// result.
struct WorkItem {
    int32_t task, head_begin, head_end;
};

}  // namespace tts

TTS_BEGIN_ISA

// Floats of scratch that one thread needs for tasks of at most `lanes` = rows x group.
int64_t tree_attention_scratch(int64_t lanes, int64_t num_kv_heads, int64_t head_dim);

// scratch: 64-byte aligned.
void tree_attention(const TreeAttentionArgs& args, WorkItem item, float* scratch);

// Second pass for rows [begin, end): merges the partials of rows with several, and fills rows with none.
// scratch: padded_dim floats.
void tree_attention_merge(const TreeAttentionArgs& args, int64_t begin, int64_t end, float* scratch);

TTS_END_ISA
