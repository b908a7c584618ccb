// torch.ops.tts_kernels.rope_append_ on a GPU
#include "../../cuda/rope_append.h"

#include "../rope_append.h"
#include "common.h"

namespace tts::ops {
namespace {

Tensor rope_append_(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
                    const Tensor& cos_sin, const Tensor& slots, int64_t num_q_heads, int64_t num_kv_heads,
                    const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
                    const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                    const std::optional<Tensor>& k_zero, const std::optional<Tensor>& v_zero) {
    const OnDevice device(qkv);
    RopeAppend work(qkv, k_cache, v_cache, positions, cos_sin, slots, num_q_heads, num_kv_heads, q_norm,
                    k_norm, eps, {k_scale, v_scale, k_zero, v_zero});
    cuda::rope_append(work.args, work.count, device.stream());
    return work.q;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) { m.impl("rope_append_", TTS_BOX(&rope_append_)); }

}  // namespace tts::ops
