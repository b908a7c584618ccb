// torch.ops.tts_kernels.score_and_prune on a GPU
#include "../../cuda/score_and_prune.h"

#include "scoring.h"

namespace tts::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> score_and_prune(
    const Tensor& hidden, const Tensor& positions, const Tensor& step_indptr, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& w1, const std::optional<Tensor>& b1,
    const std::optional<Tensor>& norm_weight, double eps, bool sigmoid, const Tensor& group_indptr,
    int64_t width, const std::optional<Tensor>& k, const std::string& how, const std::optional<Tensor>& prior,
    const std::optional<Tensor>& prior_counts, bool keep_order) {
    const OnDevice device(hidden);
    ScoreAndPrune call(hidden, positions, step_indptr, {weight, bias, w1, b1, norm_weight, eps, sigmoid},
                       group_indptr, width, k, how, prior, prior_counts, keep_order);
    const std::optional<Tensor> partials = hidden_partials(call.steps.args, call.steps.hidden);
    Tensor arrivals = empty(call.steps.hidden, {call.plan.groups()}, ScalarType::Int);
    Pruned kept = call.plan.outputs(call.steps.hidden);
    cuda::score_and_prune({.steps = call.steps.args,
                           .chains = call.chains,
                           .groups = call.plan.args({call.chains.out, DType::f32}, kept),
                           .candidate_count = call.candidates,
                           .group_count = call.plan.groups(),
                           .arrivals = data<uint32_t>(arrivals)},
                          device.stream());
    return {kept.indices, kept.counts, call.candidate_scores, call.steps.out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) {
    m.impl("score_and_prune", TTS_BOX(&score_and_prune));
}

}  // namespace tts::ops
