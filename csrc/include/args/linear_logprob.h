#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

struct LinearLogprobArgs {
    FloatArray hidden;  // [N, H]: float32, or bfloat16 where the weight is too
    int64_t hidden_stride;
    FloatArray weight;  // [V, H]
    int64_t weight_stride;
    IndexArray targets;     // [N]
    int64_t rows;           // N
    int64_t vocabulary;     // V
    int64_t width;          // H
    float inv_temperature;  // 1 / temperature
    float* max;             // [chunks, N]: the largest logit of a chunk of the vocabulary
    float* sum;             // [chunks, N]: the sum of exp(logit - max) over it
    float* target;          // [N]: the target's logit
};

}  // namespace tts
