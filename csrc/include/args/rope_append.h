#pragma once

#include <cstdint>

#include "dtypes.h"
#include "paged_cache.h"

namespace tts {

struct RopeAppendArgs {
    FloatArray qkv;  // [T, (Hq + 2 Hkv) D]: q heads, k heads, v heads
    int64_t stride;
    int64_t num_q_heads, num_kv_heads;
    int64_t head_dim;      // D, even
    IndexArray positions;  // [T]: rows of cos_sin
    const float* cos_sin;  // [max_position, D]: cosines of D / 2 angles, then sines
    const void* q_norm;    // [D] of qkv's type, or null: RMSNorm of each head before the rotation
    const void* k_norm;
    float eps;
    IndexArray slots;  // [T]: page * page_size + offset
    int64_t page_size;
    PagedCache k_cache, v_cache;  // of qkv's type, or quantised
    void* q;                      // [T, Hq, D]
    KvFormat format = KvFormat::plain;
    KvScales k_scales = {nullptr, nullptr}, v_scales = {nullptr, nullptr};
    void* rotated = nullptr;  // [T, D] of qkv's type, for quantised caches: a head of keys on its way there
};

}  // namespace tts
