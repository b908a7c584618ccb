// linear_logprob, checked and ready to run: the inputs for the kernels, the workspace and the result.
#pragma once

#include <cmath>

#include "args/linear_logprob.h"
#include "common.h"

namespace tts::ops {

struct LinearLogprob {
    Tensor hidden, weight, targets;
    int64_t chunks;
    Tensor out, partials;
    LinearLogprobArgs args;

    // The type of `hidden` [N, H] must be one that the kernel supports. A chunk is this many rows of
    // `weight`.
    LinearLogprob(const Tensor& hidden_in, const Tensor& weight_in, const Tensor& targets_in,
                  double temperature, int64_t chunk)
        : hidden(dense_rows(hidden_in)), weight(dense_rows(weight_in)), targets(dense(targets_in)) {
        require(hidden.size(1) == weight.size(1), "weight");
        require(std::isfinite(temperature) && temperature > 0, "temperature");
        const int64_t rows = hidden.size(0), vocabulary = weight.size(0);
        require(targets.numel() == rows, "targets");
        chunks = divide_up(vocabulary, chunk);
        out = empty(hidden, {rows}, ScalarType::Float);
        partials = empty(hidden, {2 * chunks, rows}, ScalarType::Float);
        args = {.hidden = {hidden.const_data_ptr(), dtype(hidden)},
                .hidden_stride = hidden.stride(0),
                .weight = {weight.const_data_ptr(), dtype(weight)},
                .weight_stride = weight.stride(0),
                .targets = indices(targets),
                .rows = rows,
                .vocabulary = vocabulary,
                .width = weight.size(1),
                .inv_temperature = static_cast<float>(1.0 / temperature),
                .max = data<float>(partials),
                .sum = data<float>(partials) + chunks * rows,
                .target = data<float>(out)};
        require_range(args.targets, rows, 0, vocabulary);
    }
};

}  // namespace tts::ops
