// The part of rope_append_ that CPU and GPU share.
#pragma once

#include <limits>

#include "args/rope_append.h"
#include "attention.h"

namespace tts::ops {

// rope_append_, checked and ready to run: the inputs made dense, and memory for the queries.
struct RopeAppend {
    Tensor qkv, positions, cos_sin, slots;
    std::optional<Tensor> q_norm, k_norm;
    int64_t count;
    Tensor q;  // [T, Hq, D]
    RopeAppendArgs args;

    RopeAppend(const Tensor& qkv_in, const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions_in,
               const Tensor& cos_sin_in, const Tensor& slots_in, int64_t num_q_heads, int64_t num_kv_heads,
               const std::optional<Tensor>& q_norm_in, const std::optional<Tensor>& k_norm_in, double eps,
               const ScaleTensors& beside)
        : qkv(dense_rows(qkv_in)),
          positions(dense(positions_in)),
          cos_sin(dense(cos_sin_in)),
          slots(dense(slots_in)),
          q_norm(dense(q_norm_in)),
          k_norm(dense(k_norm_in)),
          count(qkv.size(0)) {
        const DType type = dtype(qkv);
        require(cos_sin.dim() == 2 && num_q_heads >= 1 && num_kv_heads >= 1 && eps >= 0.0 &&
                    eps <= std::numeric_limits<float>::max(),
                "options");
        const int64_t head_dim = cos_sin.size(1);
        require(head_dim % 2 == 0 && qkv.size(1) == (num_q_heads + 2 * num_kv_heads) * head_dim, "qkv");
        const LayerCaches caches(k_cache, v_cache, qkv.scalar_type(), beside);
        caches.require_writable();
        require(k_cache.size(2) == num_kv_heads && caches.head_dim == head_dim, "caches");
        args = {.qkv = {qkv.const_data_ptr(), type},
                .stride = qkv.stride(0),
                .num_q_heads = num_q_heads,
                .num_kv_heads = num_kv_heads,
                .head_dim = head_dim,
                .positions = indices(positions),
                .cos_sin = float32(cos_sin),
                .q_norm = head_norm(q_norm, head_dim, type),
                .k_norm = head_norm(k_norm, head_dim, type),
                .eps = static_cast<float>(eps),
                .slots = indices(slots),
                .page_size = k_cache.size(1),
                .k_cache = paged_to_write(k_cache),
                .v_cache = paged_to_write(v_cache),
                .q = nullptr,
                .format = caches.format,
                .k_scales = caches.k_scales,
                .v_scales = caches.v_scales};
        require(positions.numel() == count && slots.numel() == count, "positions and slots");
        require_range(args.positions, count, 0, cos_sin.size(0));
        require_range(args.slots, count, 0, k_cache.size(0) * k_cache.size(1));
        q = empty(qkv, {count, num_q_heads, head_dim}, qkv.scalar_type());
        args.q = q.mutable_data_ptr();
    }

  private:
    static const void* head_norm(const std::optional<Tensor>& weight, int64_t head_dim, DType type) {
        if (!weight) return nullptr;
        require(weight->dim() == 1 && weight->size(0) == head_dim, "norm");
        const FloatArray array = floats(*weight);
        require(array.dtype == type, "norm");
        return array.data;
    }
};

}  // namespace tts::ops
