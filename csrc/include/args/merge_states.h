#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

struct MergeStatesArgs {
    DType dtype;                 // of both rows and out
    const void *out_a, *out_b;   // [N, D]
    const float *lse_a, *lse_b;  // [N]
    int64_t head_dim;
    void* out;   // [N, D]
    float* lse;  // [N]
};

}  // namespace tts
