// torch.ops.tts_kernels.score_and_prune on a GPU
#include "../../cuda/score_and_prune.h"

#include "scoring.h"

namespace tts::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> score_and_prune(
    const Tensor& hidden_in, const Tensor& positions_in, const Tensor& step_indptr_in, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& w1, const std::optional<Tensor>& b1,
    const std::optional<Tensor>& norm_weight, double eps, bool sigmoid, const Tensor& group_indptr,
    int64_t width, const std::optional<Tensor>& k, const std::string& how,
    const std::optional<Tensor>& prior_in, const std::optional<Tensor>& prior_counts_in, bool keep_order) {
    const OnDevice device(hidden_in);
    const Tensor hidden = dense_rows(hidden_in), positions = dense(positions_in),
                 step_indptr = dense(step_indptr_in);
    const std::optional<Tensor> prior = dense(prior_in), prior_counts = dense(prior_counts_in);
    StepScoresArgs steps =
        step_scores_args(hidden, positions, {weight, bias, w1, b1, norm_weight, eps, sigmoid});
    AggregateStepsArgs chains = aggregate_args(step_indptr, steps.steps, how, prior, prior_counts);
    const int64_t candidates = step_indptr.numel() - 1;
    const PrunePlan plan(group_indptr, candidates, width, k, keep_order);

    const std::optional<Tensor> partials = hidden_partials(steps, hidden);
    Tensor step_scores = empty(hidden, {steps.steps}, ScalarType::Float);
    Tensor candidate_scores = empty(hidden, {candidates}, ScalarType::Float);
    Tensor arrivals = empty(hidden, {plan.groups()}, ScalarType::Int);
    Pruned kept = plan.outputs(hidden);
    steps.out = data<float>(step_scores);
    chains.scores = {steps.out, DType::f32};
    chains.out = data<float>(candidate_scores);
    cuda::score_and_prune({.steps = steps,
                           .chains = chains,
                           .groups = plan.args({chains.out, DType::f32}, kept),
                           .candidate_count = candidates,
                           .group_count = plan.groups(),
                           .arrivals = data<uint32_t>(arrivals)},
                          device.stream());
    return {kept.indices, kept.counts, candidate_scores, step_scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) {
    m.impl("score_and_prune", TTS_BOX(&score_and_prune));
}

}  // namespace tts::ops
