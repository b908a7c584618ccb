// torch.ops.tts_kernels.step_scores on a GPU
#include "../../cuda/step_scores.h"

#include "scoring.h"

namespace tts::ops {
namespace {

Tensor step_scores(const Tensor& hidden_in, const Tensor& positions_in, const Tensor& weight,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& w1,
                   const std::optional<Tensor>& b1, const std::optional<Tensor>& norm_weight, double eps,
                   bool sigmoid) {
    const OnDevice device(hidden_in);
    const Tensor hidden = dense_rows(hidden_in), positions = dense(positions_in);
    StepScoresArgs args =
        step_scores_args(hidden, positions, {weight, bias, w1, b1, norm_weight, eps, sigmoid});
    const std::optional<Tensor> partials = hidden_partials(args, hidden);
    Tensor out = empty(hidden, {args.steps}, ScalarType::Float);
    args.out = data<float>(out);
    cuda::step_scores(args, device.stream());
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) { m.impl("step_scores", TTS_BOX(&step_scores)); }

}  // namespace tts::ops
