// rope_append_: all work between the projection of q, k, v and the attention, in one pass.
//
//   qkv [T, (Hq + 2 Hkv) D]  ->  q [T, Hq, D], and k, v into the cache slots of their tokens
//
// q and k get an optional RMSNorm for each head (Qwen3), then the rotary embedding (arXiv 2104.09864). The
// two halves of a head are the pairs, as for Llama in transformers:
//   y[i] = x[i] cos_i - x[i + D/2] sin_i,  y[i + D/2] = x[i + D/2] cos_i + x[i] sin_i,  i < D/2
//
// A quantised cache gets the same as from append_kv_ for the values and for the rotated keys, rounded to
// qkv's type.
#include "rope_append.h"

#include "quantized_kv.h"
#include "vec.h"
#include "vec_row.h"

TTS_BEGIN_ISA

namespace {

// One head: y = rotate(norm(x)), in float32. Without a weight there is no norm.
template <class T>
void rope_head(const T* x, const T* weight, const float* cos_sin, int64_t head_dim, float eps, T* y) {
    const int64_t half = head_dim / 2;
    const Vec factor = Vec::all(weight ? rms_factor(x, head_dim, eps) : 1.0f);
    const auto value = [&](int64_t i, int n) {
        return weight ? load(x + i, n) * factor * load(weight + i, n) : load(x + i, n);
    };
    for_vectors(half, [&](int64_t i, int n) {
        const Vec a = value(i, n), b = value(i + half, n);
        const Vec c = load(cos_sin + i, n), s = load(cos_sin + half + i, n);
        store(a * c - b * s, y + i, n);
        store(fma(a, s, b * c), y + half + i, n);
    });
}

template <class T>
T* at_slot(const PagedCache& cache, int64_t slot, int64_t page_size, int64_t head) {
    return static_cast<T*>(cache.data) + slot / page_size * cache.page_stride +
           slot % page_size * cache.token_stride + head * cache.head_stride;
}

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
