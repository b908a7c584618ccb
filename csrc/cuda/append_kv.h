#pragma once

#include "args/append_kv.h"
#include "stream.h"

namespace tts::cuda {

// Writes `tokens` new tokens into both caches of a layer. The caches have the same shape and the same slots.
void append_kv(const AppendKvArgs& k, const AppendKvArgs& v, int64_t tokens, cudaStream_t stream);

}  // namespace tts::cuda
