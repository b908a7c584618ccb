// torch.ops.tts_kernels.step_scores on a GPU
#include "../../cuda/step_scores.h"

#include "scoring.h"

namespace tts::ops {
namespace {

Tensor step_scores(const Tensor& hidden, const Tensor& positions, const Tensor& weight,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& w1,
                   const std::optional<Tensor>& b1, const std::optional<Tensor>& norm_weight, double eps,
                   bool sigmoid) {
    const OnDevice device(hidden);
    StepScores call(hidden, positions, {weight, bias, w1, b1, norm_weight, eps, sigmoid});
    const std::optional<Tensor> partials = hidden_partials(call.args, call.hidden);
    cuda::step_scores(call.args, device.stream());
    return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) { m.impl("step_scores", TTS_BOX(&step_scores)); }

}  // namespace tts::ops
