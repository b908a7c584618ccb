// linear on quantised weights, as linear, decoder_layers_ and linear_logprob call it.
#pragma once

#include "common.h"

namespace tts::ops {

// The weight of these tensors, checked: data [panels, depth / 4 (8 for 4 bits), 16, 4] uint8, scale and zero
// [panels, groups, 16] float32.
QuantizedWeight quantized_weight(const Tensor& data, const Tensor& scale, const std::optional<Tensor>& zero,
                                 int64_t in_features, int64_t out_features);

// Rows of x in whole numbers, beside the memory that holds them.
struct QuantizedRows {
    Tensor packed, scales, totals;
};

// Sets args.cut and the workspaces, and quantises the rows.
QuantizedRows quantize_rows(const Tensor& x, LinearQuantizedArgs& args);

// All of it, on torch's threads; the caller has set all that the workspaces do not depend on.
void run_quantized(const Tensor& x, LinearQuantizedArgs args);

}  // namespace tts::ops
