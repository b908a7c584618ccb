// A PRM head as an argument of operators: ScoreHead unpacked into tensors and numbers.
#pragma once

#include "common.h"

// The head's part of a schema, in the order of ScoreHead.unpack().
#define TTS_HEAD_SCHEMA \
    "Tensor weight, Tensor? bias, Tensor? w1, Tensor? b1, Tensor? norm_weight, float eps, bool sigmoid"

namespace tts::ops {

struct Head {
    const Tensor& weight;
    const std::optional<Tensor>&bias, &w1, &b1, &norm_weight;
    double eps;
    bool sigmoid;

    static bool is_vector(const Tensor& t, int64_t size) { return t.dim() == 1 && t.size(0) == size; }

    // Pointers for the kernels, after checks against H = `width`.
    HeadArgs args(int64_t width) const {
        const int64_t inner = w1 ? w1->size(0) : 0;
        require(is_vector(weight, w1 ? inner : width), "weight");
        require(!w1 || (w1->dim() == 2 && w1->size(1) == width), "w1");
        require(!b1 || (w1 && is_vector(*b1, inner)), "b1");
        require(!bias || is_vector(*bias, 1), "bias");
        require(!norm_weight || is_vector(*norm_weight, width), "norm_weight");
        return {.weight = float32(weight),
                .bias = float32(bias),
                .w1 = floats(w1),
                .b1 = floats(b1),
                .hidden_width = inner,
                .norm_weight = floats(norm_weight),
                .eps = static_cast<float>(eps),
                .sigmoid = sigmoid};
    }
};

}  // namespace tts::ops
