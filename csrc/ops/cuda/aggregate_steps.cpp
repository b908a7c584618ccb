// torch.ops.tts_kernels.aggregate_steps on a GPU
#include "../../cuda/aggregate_steps.h"

#include "../scoring.h"
#include "common.h"

namespace tts::ops {
namespace {

Tensor aggregate_steps(const Tensor& scores, const Tensor& indptr, const std::string& how) {
    const OnDevice device(scores);
    const AggregateSteps call(scores, indptr, how);
    cuda::aggregate_steps(call.args, call.candidates, device.stream());
    return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) {
    m.impl("aggregate_steps", TTS_BOX(&aggregate_steps));
}

}  // namespace tts::ops
