// torch.ops.tts_kernels.step_scores
#include "head.h"

namespace tts::ops {
namespace {

// One step reads 2 H bytes or so; below this many steps a second thread costs more than it brings.
constexpr int64_t kStepsPerThread = 16;

Tensor step_scores(const Tensor& hidden, const Tensor& positions_in, const Tensor& weight,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& w1,
                   const std::optional<Tensor>& b1, const std::optional<Tensor>& norm_weight, double eps,
                   bool sigmoid) {
    require(hidden.dim() == 2 && (hidden.stride(1) == 1 || hidden.size(1) <= 1), "hidden");
    const Tensor positions = dense(positions_in);
    const int64_t steps = positions.numel(), width = hidden.size(1);
    StepScoresArgs args{.hidden = {hidden.const_data_ptr(), dtype(hidden)},
                        .stride = hidden.stride(0),
                        .width = width,
                        .positions = indices(positions),
                        .head = Head{weight, bias, w1, b1, norm_weight, eps, sigmoid}.args(width),
                        .rows = nullptr,
                        .partials = nullptr,
                        .steps = steps,
                        .out = nullptr};
    require_range(args.positions, steps, 0, hidden.size(0));
    Tensor out = empty(hidden, {steps}, ScalarType::Float);
    args.out = data<float>(out);
    torch::stable::parallel_for(0, steps, kStepsPerThread, [&](int64_t begin, int64_t end) {
        kernels().step_scores(args, begin, end);
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("step_scores(Tensor hidden, Tensor positions, " TTS_HEAD_SCHEMA ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("step_scores", TORCH_BOX(&step_scores)); }

}  // namespace tts::ops
