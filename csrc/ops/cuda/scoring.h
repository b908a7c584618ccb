// The common part of the scoring operators on a GPU.
#pragma once

#include "../../cuda/step_scores.h"
#include "../scoring.h"
#include "common.h"

namespace tts::ops {

// The workspace for a head with a hidden layer. `args` point to it, and the result keeps it alive.
inline std::optional<Tensor> hidden_partials(StepScoresArgs& args, const Tensor& like) {
    if (!args.head.w1.data) return std::nullopt;
    const int64_t blocks = (args.head.hidden_width + cuda::kHiddenUnits - 1) / cuda::kHiddenUnits;
    Tensor partials = empty(like, {blocks, args.steps}, ScalarType::Float);
    args.partials = data<float>(partials);
    return partials;
}

}  // namespace tts::ops
