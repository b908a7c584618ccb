// torch.ops.tts_kernels.rope_append_
#include "rope_append.h"

#include "decoder.h"

namespace tts::ops {

Tensor rope_append_(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
                    const Tensor& cos_sin, const Tensor& slots, int64_t num_q_heads, int64_t num_kv_heads,
                    const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
                    const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                    const std::optional<Tensor>& k_zero, const std::optional<Tensor>& v_zero) {
    RopeAppend work(qkv, k_cache, v_cache, positions, cos_sin, slots, num_q_heads, num_kv_heads, q_norm,
                    k_norm, eps, {k_scale, v_scale, k_zero, v_zero});
    const int64_t staged = work.args.format == KvFormat::plain ? 0 : work.count;
    Tensor rotated = empty(qkv, {staged, work.args.head_dim}, qkv.scalar_type());
    work.args.rotated = rotated.mutable_data_ptr();
    parallel_for(0, work.count, row_grain(qkv.size(1)),
                 [&](int64_t begin, int64_t end) { kernels().rope_append(work.args, begin, end); });
    return work.q;
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
