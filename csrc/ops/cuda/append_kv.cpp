// torch.ops.tts_kernels.append_kv_ on a GPU
#include "../../cuda/append_kv.h"

#include "../attention.h"
#include "common.h"

namespace tts::ops {
namespace {

void append_kv_(Tensor k_cache, Tensor v_cache, const Tensor& k_in, const Tensor& v_in,
                const Tensor& slots_in) {
    const OnDevice device(k_cache);
    const Tensor slots = dense(slots_in);
    const IndexArray index = indices(slots);
    require(same_cache(k_cache, v_cache) && writable(k_cache) && writable(v_cache), "caches");
    require(fits(k_in, k_cache, slots.numel()) && fits(v_in, v_cache, slots.numel()), "k, v");
    const Tensor k = rows_contiguous(k_in) ? k_in : dense(k_in),
                 v = rows_contiguous(v_in) ? v_in : dense(v_in);
    cuda::append_kv(append_args(k_cache, k, index), append_args(v_cache, v, index), slots.numel(),
                    device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) { m.impl("append_kv_", TTS_BOX(&append_kv_)); }

}  // namespace tts::ops
