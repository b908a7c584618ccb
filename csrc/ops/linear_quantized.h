// linear with quantised weights on a CPU, for linear, decoder_layers_ and linear_logprob.
#pragma once

#include "linear.h"

namespace tts::ops {

// Sets args.cut and the workspaces, and quantises the rows. The result is the memory that holds them.
Tensor quantize_rows(const Tensor& x, LinearQuantizedArgs& args);

// Runs all of it on torch's threads. The caller has set all arguments except the workspaces and `cut`.
void run_quantized(const Tensor& x, LinearQuantizedArgs args);

}  // namespace tts::ops
