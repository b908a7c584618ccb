#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace tts {

// A KV cache [P, page_size, Hkv, D], last dimension contiguous.
struct CachePages {
    void* data;
    int64_t page_stride, token_stride, head_stride;
};

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
    CachePages k_cache, v_cache;  // of qkv's type
    void* q;                      // [T, Hq, D]
};

}  // namespace tts

TTS_BEGIN_ISA

// Tokens [begin, end).
void rope_append(const RopeAppendArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
