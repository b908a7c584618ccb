// torch.ops.tts_kernels.rope_append_
#include <limits>

#include "attention.h"
#include "decoder.h"

namespace tts::ops {
namespace {

const void* head_norm(const std::optional<Tensor>& weight, int64_t head_dim, DType type) {
    if (!weight) return nullptr;
    require(weight->dim() == 1 && weight->size(0) == head_dim, "norm");
    const FloatArray array = floats(*weight);
    require(array.dtype == type, "norm");
    return array.data;
}

}  // namespace

Tensor rope_append_(const Tensor& qkv_in, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& positions_in, const Tensor& cos_sin_in, const Tensor& slots_in,
                    int64_t num_q_heads, int64_t num_kv_heads, const std::optional<Tensor>& q_norm_in,
                    const std::optional<Tensor>& k_norm_in, double eps, const std::optional<Tensor>& k_scale,
                    const std::optional<Tensor>& v_scale, const std::optional<Tensor>& k_zero,
                    const std::optional<Tensor>& v_zero) {
    const Tensor qkv = dense_rows(qkv_in), positions = dense(positions_in), slots = dense(slots_in);
    const Tensor cos_sin = dense(cos_sin_in);
    const std::optional<Tensor> q_norm = dense(q_norm_in), k_norm = dense(k_norm_in);
    const DType type = dtype(qkv);
    require(cos_sin.dim() == 2 && num_q_heads >= 1 && num_kv_heads >= 1 && eps >= 0.0 &&
                eps <= std::numeric_limits<float>::max(),
            "options");
    const int64_t count = qkv.size(0), head_dim = cos_sin.size(1);
    require(head_dim % 2 == 0 && qkv.size(1) == (num_q_heads + 2 * num_kv_heads) * head_dim, "qkv");
    const LayerCaches caches(k_cache, v_cache, qkv.scalar_type(), {k_scale, v_scale, k_zero, v_zero});
    caches.require_writable();
    require(k_cache.size(2) == num_kv_heads && caches.head_dim == head_dim, "caches");
    RopeAppendArgs args{.qkv = {qkv.const_data_ptr(), type},
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
    Tensor q = empty(qkv, {count, num_q_heads, head_dim}, qkv.scalar_type());
    args.q = q.mutable_data_ptr();
    const int64_t staged = caches.format == KvFormat::plain ? 0 : count;
    Tensor rotated = empty(qkv, {staged, head_dim}, qkv.scalar_type());
    args.rotated = rotated.mutable_data_ptr();
    parallel_for(0, count, row_grain(qkv.size(1)),
                 [&](int64_t begin, int64_t end) { kernels().rope_append(args, begin, end); });
    return q;
}

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def(
        "rope_append_(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor cos_sin, "
        "Tensor slots, int num_q_heads, int num_kv_heads, Tensor? q_norm, Tensor? k_norm, float eps, "
        "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, Tensor(e!)? k_zero=None, Tensor(f!)? "
        "v_zero=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("rope_append_", TTS_BOX(&rope_append_)); }

}  // namespace tts::ops
