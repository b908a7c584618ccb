#pragma once

#include "args/step_scores.h"
#include "stream.h"

namespace tts::cuda {

// The number of hidden units in one block of an MLP head, like kHiddenBlock on the CPU. Of the workspace in
// StepScoresArgs, only `partials` [H1 / kHiddenUnits, S] is used.
inline constexpr int64_t kHiddenUnits = 128;

// Scores every step. A head with a hidden layer needs two launches: step_scores_hidden and one that finishes.
void step_scores(const StepScoresArgs& args, cudaStream_t stream);
void step_scores_hidden(const StepScoresArgs& args, cudaStream_t stream);

}  // namespace tts::cuda
