#pragma once

#include "args/linear_logprob.h"
#include "stream.h"

namespace tts::cuda {

// Rows of the weight for one block. This is the unit of work, and it fixes the order of the sum.
inline constexpr int64_t kLogprobChunk = 256;

// `max` and `sum` have ceil(V / kLogprobChunk) rows. The two operands may have different types. The result
// overwrites the target's logit.
void linear_logprob(const LinearLogprobArgs& args, cudaStream_t stream);

}  // namespace tts::cuda
