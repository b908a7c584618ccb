// torch.ops.tts_kernels.score_and_prune
#include "scoring.h"

namespace tts::ops {
namespace {

// The same thread scores steps and folds them into their candidate; then groups are pruned. A head with a
// hidden layer reads W1 once for all steps, so all steps are scored first.
std::tuple<Tensor, Tensor, Tensor, Tensor> score_and_prune(
    const Tensor& hidden, const Tensor& positions, const Tensor& step_indptr, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& w1, const std::optional<Tensor>& b1,
    const std::optional<Tensor>& norm_weight, double eps, bool sigmoid, const Tensor& group_indptr,
    int64_t width, const std::optional<Tensor>& k, const std::string& how, const std::optional<Tensor>& prior,
    const std::optional<Tensor>& prior_counts, bool keep_order) {
    const ScoreAndPrune call(hidden, positions, step_indptr,
                             {weight, bias, w1, b1, norm_weight, eps, sigmoid}, group_indptr, width, k, how,
                             prior, prior_counts, keep_order);
    const StepScoresArgs& steps = call.steps.args;
    const AggregateStepsArgs& chains = call.chains;
    const int64_t candidates = call.candidates;
    if (w1) score_with_hidden_layer(steps, call.steps.hidden);
    const int64_t grain = kStepsPerThread * candidates / std::max<int64_t>(1, steps.steps);
    parallel_for(0, candidates, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
        if (!w1) kernels().step_scores(steps, at(chains.indptr, begin), at(chains.indptr, end));
        kernels().aggregate_steps(chains, begin, end);
    });
    const Pruned kept = call.plan.run(call.candidate_scores);
    return {kept.indices, kept.counts, call.candidate_scores, call.steps.out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("score_and_prune(Tensor hidden, Tensor positions, Tensor step_indptr, " TTS_HEAD_SCHEMA
          ", Tensor group_indptr, int width, Tensor? k, str how, Tensor? prior, Tensor? prior_counts, "
          "bool keep_order) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("score_and_prune", TTS_BOX(&score_and_prune)); }

}  // namespace tts::ops
