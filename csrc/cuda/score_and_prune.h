#pragma once

#include "aggregate_steps.h"
#include "prune.h"
#include "step_scores.h"

namespace tts::cuda {

struct ScoreAndPruneArgs {
    StepScoresArgs steps;
    AggregateStepsArgs chains;  // `scores` are what `steps` writes
    PruneArgs groups;           // `scores` are what `chains` writes, float32
    int64_t candidate_count, group_count;
    uint32_t* arrivals;  // [G] workspace
};

// One launch; one more, before it, for a head with a hidden layer.
void score_and_prune(const ScoreAndPruneArgs& args, cudaStream_t stream);

}  // namespace tts::cuda
