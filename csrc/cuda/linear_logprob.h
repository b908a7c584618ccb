#pragma once

#include "args/linear_logprob.h"
#include "stream.h"

namespace tts::cuda {

// Rows of the weight that a block takes: the unit of work and of the sum's order.
inline constexpr int64_t kLogprobChunk = 256;

// `max` and `sum` have ceil(V / kLogprobChunk) rows; operands may be of any two types. The result replaces
// the target's logit.
void linear_logprob(const LinearLogprobArgs& args, cudaStream_t stream);

}  // namespace tts::cuda
