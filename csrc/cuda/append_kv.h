#pragma once

#include "args/append_kv.h"
#include "stream.h"

namespace tts::cuda {

// `tokens` new tokens into both caches of a layer, which have one shape and one list of slots.
void append_kv(const AppendKvArgs& k, const AppendKvArgs& v, int64_t tokens, cudaStream_t stream);

}  // namespace tts::cuda
