#pragma once

#include "args/score_and_prune.h"
#include "stream.h"

namespace tts::cuda {

// One launch, after another one for a head with a hidden layer.
void score_and_prune(const ScoreAndPruneArgs& args, cudaStream_t stream);

}  // namespace tts::cuda
