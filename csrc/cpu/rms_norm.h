#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

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

TTS_BEGIN_ISA

// Rows [begin, end).
void rms_norm(const RmsNormArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
