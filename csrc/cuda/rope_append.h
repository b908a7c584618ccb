#pragma once

#include "args/rope_append.h"
#include "stream.h"

namespace tts::cuda {

// Rotates the queries and keys of `tokens` new tokens, and writes keys and values into the caches of a layer.
void rope_append(const RopeAppendArgs& args, int64_t tokens, cudaStream_t stream);

}  // namespace tts::cuda
