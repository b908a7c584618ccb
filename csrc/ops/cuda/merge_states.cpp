// torch.ops.tts_kernels.merge_states on a GPU
#include "../../cuda/merge_states.h"

#include "../attention.h"
#include "common.h"

namespace tts::ops {
namespace {

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                        const Tensor& lse_b) {
    const OnDevice device(out_a);
    const MergeStates states(out_a, lse_a, out_b, lse_b);
    cuda::merge_states(states.args, states.lse.numel(), device.stream());
    return {states.out, states.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) { m.impl("merge_states", TTS_BOX(&merge_states)); }

}  // namespace tts::ops
