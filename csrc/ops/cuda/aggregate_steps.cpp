// torch.ops.tts_kernels.aggregate_steps on a GPU
#include "../../cuda/aggregate_steps.h"

#include "../scoring.h"
#include "common.h"

namespace tts::ops {
namespace {

Tensor aggregate_steps(const Tensor& scores_in, const Tensor& indptr_in, const std::string& how) {
    const OnDevice device(scores_in);
    const Tensor scores = dense(scores_in), indptr = dense(indptr_in);
    require(scores.dim() == 1, "scores");
    AggregateStepsArgs args = aggregate_args(indptr, scores.numel(), how);
    const int64_t candidates = indptr.numel() - 1;
    Tensor out = empty(scores, {candidates}, ScalarType::Float);
    args.scores = floats(scores);
    args.out = data<float>(out);
    cuda::aggregate_steps(args, candidates, device.stream());
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) {
    m.impl("aggregate_steps", TTS_BOX(&aggregate_steps));
}

}  // namespace tts::ops
