// aggregate_steps: one number for each candidate from the scores of its steps.
//
//   scores [S], candidate c owns scores[indptr[c] : indptr[c + 1]]  ->  out [C]
//
// A candidate has about ten steps, so one thread processes whole candidates, and nothing is vectorised.
#include "aggregate_steps.h"

#include "vec.h"

TTS_BEGIN_ISA

void aggregate_steps(const AggregateStepsArgs& args, int64_t begin, int64_t end) {
    const auto start = [&](int64_t c) -> AggregateState {
        if (!args.prior.data) return {args.how, 0.0f, 0};
        const float prior = visit(args.prior, [&](const auto* p) { return to_float(p[c]); });
        return {args.how, prior, at(args.prior_counts, c)};
    };
    visit(args.scores, [&](const auto* scores) {
        for (int64_t c = begin; c < end; ++c) {
            AggregateState state = start(c);
            for (int64_t s = at(args.indptr, c); s < at(args.indptr, c + 1); ++s)
                state.add(to_float(scores[s]));
            args.out[c] = state.value();
        }
    });
}

TTS_END_ISA
