// The aggregate of one candidate, by the same arithmetic as csrc/cpu/aggregate_steps.cpp.
#pragma once

#include "args/aggregate_steps.h"
#include "vector.cuh"

namespace tts::cuda {

// In the order of the steps, so that rounding in float64 is the same as on the CPU.
__device__ inline float aggregate(const AggregateStepsArgs& args, int64_t candidate) {
    AggregateState state(args.how, args.prior.data ? load(args.prior, candidate) : 0.0f,
                         args.prior.data ? at(args.prior_counts, candidate) : 0);
    const int64_t end = at(args.indptr, candidate + 1);
    for (int64_t s = at(args.indptr, candidate); s < end; ++s) state.add(load(args.scores, s));
    return state.value();
}

}  // namespace tts::cuda
