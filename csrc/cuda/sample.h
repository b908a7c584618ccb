#pragma once

#include "args/sample.h"
#include "stream.h"

namespace tts::cuda {

void sample(const SampleArgs& args, cudaStream_t stream);

}  // namespace tts::cuda
