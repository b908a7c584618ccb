// rope_append_: what happens between the projection of q, k, v and the attention, in one pass over them.
//
//   qkv [T, (Hq + 2 Hkv) D]  ->  q [T, Hq, D], and k, v into the cache slots of their tokens
//
// q and k: an optional RMSNorm of each head (Qwen3), then the rotary embedding (arXiv 2104.09864) with the
// halves of a head as its pairs, as transformers has it for Llama:
//   y[i] = x[i] cos_i - x[i + D/2] sin_i,  y[i + D/2] = x[i + D/2] cos_i + x[i] sin_i,  i < D/2
#include "rope_append.h"

#include "vec.h"
#include "vec_row.h"

TTS_BEGIN_ISA

namespace {

// One head: y = rotate(norm(x)), all in float32; a null weight leaves the norm out.
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

}  // namespace

void rope_append(const RopeAppendArgs& args, int64_t begin, int64_t end) {
    const int64_t D = args.head_dim, q_heads = args.num_q_heads, kv_heads = args.num_kv_heads;
    dispatch(args.qkv.dtype, [&]<class T>(T*) {
        const T *q_norm = static_cast<const T*>(args.q_norm), *k_norm = static_cast<const T*>(args.k_norm);
        for (int64_t t = begin; t < end; ++t) {
            const T* x = static_cast<const T*>(args.qkv.data) + t * args.stride;
            const float* angles = args.cos_sin + at(args.positions, t) * D;
            const int64_t slot = at(args.slots, t);
            T* q = static_cast<T*>(args.q) + t * q_heads * D;
            for (int64_t h = 0; h < q_heads; ++h, x += D)
                rope_head(x, q_norm, angles, D, args.eps, q + h * D);
            for (int64_t h = 0; h < kv_heads; ++h, x += D) {
                rope_head(x, k_norm, angles, D, args.eps, at_slot<T>(args.k_cache, slot, args.page_size, h));
            }
            for (int64_t h = 0; h < kv_heads; ++h, x += D) {
                __builtin_memcpy(at_slot<T>(args.v_cache, slot, args.page_size, h), x, D * sizeof(T));
            }
        }
    });
}

TTS_END_ISA
