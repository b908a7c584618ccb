#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

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

TTS_BEGIN_ISA

// Rows [begin, end).
void merge_states(const MergeStatesArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
