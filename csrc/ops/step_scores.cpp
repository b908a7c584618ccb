// torch.ops.tts_kernels.step_scores
#include "scoring.h"

namespace tts::ops {
namespace {

Tensor step_scores(const Tensor& hidden, const Tensor& positions, const Tensor& weight,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& w1,
                   const std::optional<Tensor>& b1, const std::optional<Tensor>& norm_weight, double eps,
                   bool sigmoid) {
    const StepScores call(hidden, positions, {weight, bias, w1, b1, norm_weight, eps, sigmoid});
    const StepScoresArgs& args = call.args;
    if (w1) {
        score_with_hidden_layer(args, call.hidden);
    } else {
        parallel_for(0, args.steps, kStepsPerThread,
                     [&](int64_t begin, int64_t end) { kernels().step_scores(args, begin, end); });
    }
    return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("step_scores(Tensor hidden, Tensor positions, " TTS_HEAD_SCHEMA ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("step_scores", TTS_BOX(&step_scores)); }

}  // namespace tts::ops
