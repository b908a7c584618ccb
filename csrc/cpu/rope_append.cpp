// rope_append_: all work between the projection of q, k, v and the attention, in one pass.
//
//   qkv [T, (Hq + 2 Hkv) D]  ->  q [T, Hq, D], and k, v into the cache slots of their tokens
//
// q and k get an optional RMSNorm for each head (Qwen3), then the rotary embedding.
//
// A quantised cache gets the same as from append_kv_ for the values and for the rotated keys, rounded to
// qkv's type.
#include "rope_append.h"

#include "quantized_kv.h"
#include "rope.h"
#include "slots.h"
#include "vec.h"

TTS_BEGIN_ISA

namespace {

// Stores the keys and values of token t, from its heads of k on.
template <class T>
void append(const RopeAppendArgs& args, int64_t t, const T* x, const float* angles) {
    const int64_t D = args.head_dim, slot = at(args.slots, t);
    const T* k_norm = static_cast<const T*>(args.k_norm);
    for (int64_t h = 0; h < args.num_kv_heads; ++h, x += D) {
        rope_head(x, k_norm, angles, D, args.eps, at_slot<T>(args.k_cache, slot, args.page_size, h));
    }
    for (int64_t h = 0; h < args.num_kv_heads; ++h, x += D) {
        __builtin_memcpy(at_slot<T>(args.v_cache, slot, args.page_size, h), x, D * sizeof(T));
    }
}

template <class T>
void append_quantized(const RopeAppendArgs& args, int64_t t, const T* x, const float* angles) {
    const int64_t D = args.head_dim, slot = at(args.slots, t), first = slot * args.num_kv_heads;
    const T* k_norm = static_cast<const T*>(args.k_norm);
    T* rotated = static_cast<T*>(args.rotated) + t * D;
    for (int64_t h = 0; h < args.num_kv_heads; ++h, x += D) {
        rope_head(x, k_norm, angles, D, args.eps, rotated);
        quantize_head(rotated, D, args.format, at_slot<char>(args.k_cache, slot, args.page_size, h),
                      args.k_scales, first + h);
    }
    for (int64_t h = 0; h < args.num_kv_heads; ++h, x += D) {
        quantize_head(x, D, args.format, at_slot<char>(args.v_cache, slot, args.page_size, h), args.v_scales,
                      first + h);
    }
}

}  // namespace

void rope_append(const RopeAppendArgs& args, int64_t begin, int64_t end) {
    const int64_t D = args.head_dim, q_heads = args.num_q_heads;
    const bool plain = args.format == KvFormat::plain;
    dispatch(args.qkv.dtype, [&]<class T>(T*) {
        const T* q_norm = static_cast<const T*>(args.q_norm);
        for (int64_t t = begin; t < end; ++t) {
            const T* x = static_cast<const T*>(args.qkv.data) + t * args.stride;
            const float* angles = args.cos_sin + at(args.positions, t) * D;
            T* q = static_cast<T*>(args.q) + t * q_heads * D;
            for (int64_t h = 0; h < q_heads; ++h, x += D)
                rope_head(x, q_norm, angles, D, args.eps, q + h * D);
            plain ? append(args, t, x, angles) : append_quantized(args, t, x, angles);
        }
    });
}

TTS_END_ISA
