#pragma once

#include "args/aggregate_steps.h"
#include "stream.h"

namespace tts::cuda {

void aggregate_steps(const AggregateStepsArgs& args, int64_t candidates, cudaStream_t stream);

}  // namespace tts::cuda
