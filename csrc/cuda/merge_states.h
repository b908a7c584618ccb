#pragma once

#include "args/merge_states.h"
#include "stream.h"

namespace tts::cuda {

void merge_states(const MergeStatesArgs& args, int64_t rows, cudaStream_t stream);

}  // namespace tts::cuda
