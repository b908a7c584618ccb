#pragma once

#include "args/step_scores.h"
#include "stream.h"

namespace tts::cuda {

// Hidden units of one block of an MLP head, as kHiddenBlock is on the CPU. Of the workspace in StepScoresArgs
// only `partials` [H1 / kHiddenUnits, S] is used.
inline constexpr int64_t kHiddenUnits = 128;

// Every step; a head with a hidden layer takes two launches, step_scores_hidden and one that finishes.
void step_scores(const StepScoresArgs& args, cudaStream_t stream);
void step_scores_hidden(const StepScoresArgs& args, cudaStream_t stream);

}  // namespace tts::cuda
