#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

struct RmsNormArgs {
    FloatArray x;  // [T, H]
    int64_t x_stride;
    const void* residual;  // [T, H] of x's type, or null
    int64_t residual_stride;
    const void* weight;  // [H] of x's type
    int64_t width;       // H
    float eps;
    void* normed;  // [T, H]
    void* sum;     // [T, H]: x + residual, with a residual only
};

}  // namespace tts
