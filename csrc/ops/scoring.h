// The parts of score_and_prune: scores of steps, aggregates of chains, pruning. Each part checks its
// arguments and converts them to plain structs. The ops with the same names run one of the parts.
#pragma once

#include <algorithm>

#include "head.h"

namespace tts::ops {

// ---- scores of steps --------------------------------------------------------------------------------------

// One step reads about 2 H bytes. With fewer steps, a second thread costs more than it saves.
inline constexpr int64_t kStepsPerThread = 16;

// Arguments for the kernels, after checks; `out` is not set. `hidden` must have dense rows, `positions` must
// be contiguous, and both must outlive the result.
inline StepScoresArgs step_scores_args(const Tensor& hidden, const Tensor& positions, const Head& head) {
    StepScoresArgs args{.hidden = {hidden.const_data_ptr(), dtype(hidden)},
                        .stride = hidden.stride(0),
                        .width = hidden.size(1),
                        .positions = indices(positions),
                        .steps = positions.numel(),
                        .head = head.args(hidden.size(1)),
                        .out = nullptr,
                        .rows = nullptr,
                        .bf16_rows = false,
                        .partials = nullptr};
    require_range(args.positions, args.steps, 0, hidden.size(0));
    return args;
}

// step_scores, checked and ready to run.
struct StepScores {
    Tensor hidden, positions;
    StepScoresArgs args;
    Tensor out;  // [S]

    StepScores(const Tensor& hidden_in, const Tensor& positions_in, const Head& head)
        : hidden(dense_rows(hidden_in)),
          positions(dense(positions_in)),
          args(step_scores_args(hidden, positions, head)),
          out(empty(hidden, {args.steps}, ScalarType::Float)) {
        args.out = data<float>(out);
    }
};

// Scores every step of a head with a hidden layer; `like` gives the workspace its device.
inline void score_with_hidden_layer(StepScoresArgs args, const Tensor& like) {
    const int64_t blocks = divide_up(args.head.hidden_width, kHiddenBlock);
    args.bf16_rows =
        args.hidden.dtype == DType::bf16 && args.head.w1.dtype == DType::bf16 && !args.head.norm_weight.data;
    Tensor rows =
        empty(like, {args.steps, args.width}, args.bf16_rows ? ScalarType::BFloat16 : ScalarType::Float);
    Tensor partials = empty(like, {blocks, args.steps}, ScalarType::Float);
    args.rows = rows.mutable_data_ptr();
    args.partials = data<float>(partials);
    const auto run = [&](auto kernel, int64_t count, int64_t grain) {
        parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    };
    run(kernels().step_scores_gather, args.steps, kStepsPerThread);
    run(kernels().step_scores_hidden, args.steps > 0 ? blocks : 0, 1);
    run(kernels().step_scores_finish, args.steps, 1024);
}

// ---- aggregates of chains ---------------------------------------------------------------------------------

// Arguments for the kernel, after checks; `scores` and `out` are not set. The tensors must be contiguous and
// outlive the result.
inline AggregateStepsArgs aggregate_args(const Tensor& indptr, int64_t steps, const std::string& how,
                                         const std::optional<Tensor>& prior = std::nullopt,
                                         const std::optional<Tensor>& prior_counts = std::nullopt) {
    AggregateStepsArgs args{.scores = {nullptr, DType::f32},
                            .indptr = indices(indptr),
                            .how = aggregate(how),
                            .prior = floats(prior),
                            .prior_counts = {nullptr, false},
                            .out = nullptr};
    require_indptr(args.indptr, indptr.numel(), steps);
    require(prior.has_value() == prior_counts.has_value(), "prior");
    if (prior) {
        const int64_t candidates = indptr.numel() - 1;
        args.prior_counts = indices(*prior_counts);
        require(prior->dim() == 1 && prior->numel() == candidates, "prior");
        require(prior_counts->numel() == candidates, "prior_counts");
        require_range(args.prior_counts, candidates, 0, INT64_MAX);
    }
    return args;
}

// aggregate_steps, checked and ready to run.
struct AggregateSteps {
    Tensor scores, indptr;
    int64_t candidates;
    Tensor out;  // [C]
    AggregateStepsArgs args;

    AggregateSteps(const Tensor& scores_in, const Tensor& indptr_in, const std::string& how)
        : scores(dense(scores_in)),
          indptr(dense(indptr_in)),
          candidates(indptr.numel() - 1),
          args(aggregate_args(indptr, scores.numel(), how)) {
        require(scores.dim() == 1, "scores");
        out = empty(scores, {candidates}, ScalarType::Float);
        args.scores = floats(scores);
        args.out = data<float>(out);
    }
};

// ---- pruning ----------------------------------------------------------------------------------------------

// With fewer scores, a second thread costs more than it saves.
inline constexpr int64_t kScoresPerThread = 32768;

struct Pruned {
    Tensor indices, counts;
};

// The checks that need no scores, so that score_and_prune can run them before it writes anything.
struct PrunePlan {
    Tensor indptr;
    std::optional<Tensor> k;
    int64_t width;
    bool keep_order;

    PrunePlan(const Tensor& indptr_in, int64_t candidates, int64_t width_in,
              const std::optional<Tensor>& k_in, bool keep)
        : indptr(dense(indptr_in)), width(width_in), keep_order(keep) {
        require_indptr(indices(indptr), indptr.numel(), candidates);
        require(width >= (k_in ? 0 : 1), "k");
        if (!k_in) return;
        k = dense(*k_in);
        require(k->numel() == groups(), "k");
        require_range(indices(*k), groups(), 0, width + 1);
    }

    int64_t groups() const { return indptr.numel() - 1; }

    Pruned outputs(const Tensor& like) const {
        return {empty(like, {groups(), width}, ScalarType::Long), empty(like, {groups()}, ScalarType::Int)};
    }

    // `keys` is not set.
    PruneArgs args(FloatArray scores, Pruned& out) const {
        return {.scores = scores,
                .indptr = indices(indptr),
                .k = k ? indices(*k) : IndexArray{nullptr, false},
                .width = width,
                .keep_order = keep_order,
                .keys = nullptr,
                .indices = data<int64_t>(out.indices),
                .counts = data<int32_t>(out.counts)};
    }

    Pruned run(const Tensor& scores) const {
        const int64_t candidates = scores.numel();
        Pruned out = outputs(scores);
        PruneArgs args = this->args(floats(scores), out);
        std::optional<Tensor> keys;
        if (width > kFewSurvivors) {
            keys = empty(scores, {candidates}, ScalarType::Int);
            args.keys = data<int32_t>(*keys);
        }
        const int64_t grain =
            std::max<int64_t>(1, kScoresPerThread * groups() / std::max<int64_t>(1, candidates));
        parallel_for(0, groups(), grain,
                     [&](int64_t begin, int64_t end) { kernels().prune(args, begin, end); });
        return out;
    }
};

// ---- all of it --------------------------------------------------------------------------------------------

// score_and_prune, checked and ready to run. All checks are done before anything is written.
struct ScoreAndPrune {
    StepScores steps;
    Tensor step_indptr;
    std::optional<Tensor> prior, prior_counts;
    AggregateStepsArgs chains;  // for the scores of `steps`
    int64_t candidates;
    PrunePlan plan;
    Tensor candidate_scores;  // [C]

    ScoreAndPrune(const Tensor& hidden, const Tensor& positions, const Tensor& step_indptr_in,
                  const Head& head, const Tensor& group_indptr, int64_t width, const std::optional<Tensor>& k,
                  const std::string& how, const std::optional<Tensor>& prior_in,
                  const std::optional<Tensor>& prior_counts_in, bool keep_order)
        : steps(hidden, positions, head),
          step_indptr(dense(step_indptr_in)),
          prior(dense(prior_in)),
          prior_counts(dense(prior_counts_in)),
          chains(aggregate_args(step_indptr, steps.args.steps, how, prior, prior_counts)),
          candidates(step_indptr.numel() - 1),
          plan(group_indptr, candidates, width, k, keep_order),
          candidate_scores(empty(steps.hidden, {candidates}, ScalarType::Float)) {
        chains.scores = {steps.args.out, DType::f32};
        chains.out = data<float>(candidate_scores);
    }
};

}  // namespace tts::ops
