#pragma once

#include "args/prune.h"
#include "stream.h"

namespace tts::cuda {

// Prunes every group. `keys` is not used.
void prune(const PruneArgs& args, int64_t groups, cudaStream_t stream);

}  // namespace tts::cuda
