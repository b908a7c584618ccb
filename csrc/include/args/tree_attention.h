#pragma once

#include <cstdint>

#include "dtypes.h"
#include "paged_cache.h"
#include "plan.h"

namespace tts {

struct TreeAttentionArgs {
    DType dtype;    // of q and out, and of both caches if they are plain
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
    const float* sinks;    // [Hq] or null: for each head a logit without a value
    void* out;             // [T, Hq, D]
    float* lse;            // [T, Hq]
    // Workspace: the slots of partial states. A row is padded to whole vectors.
    float* partial_rows;    // [slots, Hq, padded_dim]: sum of weights times values
    float* partial_states;  // [slots, Hq, 2]: max (log2), sum
    int64_t padded_dim;     // D rounded up to kRowAlign
    KvFormat format = KvFormat::plain;
    KvScales k_scales = {nullptr, nullptr}, v_scales = {nullptr, nullptr};
};

}  // namespace tts
