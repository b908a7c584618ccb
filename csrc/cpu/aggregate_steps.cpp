// aggregate_steps: one number for each candidate from the scores of its steps.
//
//   scores [S], candidate c owns scores[indptr[c] : indptr[c + 1]]  ->  out [C]
//
// A candidate has about ten steps, so one thread reads whole candidates and nothing is vectorised.
#include "aggregate_steps.h"

#include "vec.h"

TTS_BEGIN_ISA

void aggregate_steps(const AggregateStepsArgs& args, int64_t begin, int64_t end) {
    dispatch(args.scores.dtype, [&](auto* type) {
        const auto* scores = static_cast<decltype(type)>(const_cast<void*>(args.scores.data));
        for (int64_t c = begin; c < end; ++c) {
            AggregateState state(args.how, 0.0f, 0);
            for (int64_t s = at(args.indptr, c); s < at(args.indptr, c + 1); ++s) state.add(to_float(scores[s]));
            args.out[c] = state.value();
        }
    });
}

TTS_END_ISA
