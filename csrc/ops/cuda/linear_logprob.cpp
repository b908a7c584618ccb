// torch.ops.tts_kernels.linear_logprob on a GPU
#include "../../cuda/linear_logprob.h"

#include "../linear_logprob.h"
#include "common.h"

namespace tts::ops {
namespace {

Tensor linear_logprob(const Tensor& hidden, const Tensor& weight, const Tensor& targets, double temperature) {
    const OnDevice device(hidden);
    const LinearLogprob call(hidden, weight, targets, temperature, cuda::kLogprobChunk);
    cuda::linear_logprob(call.args, device.stream());
    return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) {
    m.impl("linear_logprob", TTS_BOX(&linear_logprob));
}

}  // namespace tts::ops
