// linear on quantised weights on a CPU, as linear, decoder_layers_ and linear_logprob call it.
#pragma once

#include "linear.h"

namespace tts::ops {

// Sets args.cut and the workspaces, and quantises the rows; the result is the memory that holds them.
Tensor quantize_rows(const Tensor& x, LinearQuantizedArgs& args);

// All of it, on torch's threads; the caller has set all that the workspaces do not depend on.
void run_quantized(const Tensor& x, LinearQuantizedArgs args);

}  // namespace tts::ops
