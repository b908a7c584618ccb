// torch.ops.tts_kernels.append_kv_ on a GPU
#include "../../cuda/append_kv.h"

#include "../attention.h"
#include "common.h"

namespace tts::ops {
namespace {

void append_kv_(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& slots,
                const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                const std::optional<Tensor>& k_zero, const std::optional<Tensor>& v_zero) {
    const OnDevice device(k_cache);
    const AppendKv tokens(k_cache, v_cache, k, v, slots, {k_scale, v_scale, k_zero, v_zero});
    cuda::append_kv(tokens.k_args, tokens.v_args, tokens.count, device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) { m.impl("append_kv_", TTS_BOX(&append_kv_)); }

}  // namespace tts::ops
