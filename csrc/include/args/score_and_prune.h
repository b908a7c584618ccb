#pragma once

#include <cstdint>

#include "args/aggregate_steps.h"
#include "args/prune.h"
#include "args/step_scores.h"

namespace tts {

struct ScoreAndPruneArgs {
    StepScoresArgs steps;
    AggregateStepsArgs chains;  // `scores` is the output of `steps`
    PruneArgs groups;           // `scores` is the output of `chains`, float32
    int64_t candidate_count, group_count;
    uint32_t* arrivals;  // [G] workspace of the CUDA kernel
};

}  // namespace tts
