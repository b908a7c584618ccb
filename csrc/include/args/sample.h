#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

struct SampleOptions {
    float temperature;  // >= 0; 0: the largest logit
    int64_t top_k;      // >= 0; 0: off
    float top_p;        // in (0, 1]; 1: off
    float min_p;        // in [0, 1]
    int64_t seed, offset;
};

struct SampleArgs {
    FloatArray logits;          // [B, V]
    int64_t stride;             // elements from one row to the next
    int64_t rows;               // B
    int64_t vocab;              // V
    SampleOptions same;         // of every row, but for those that have an array:
    const float* temperatures;  // [B] or null, as the following
    IndexArray top_ks;
    const float *top_ps, *min_ps;
    const int64_t *seeds, *offsets;  // [B]
    int64_t* tokens;                 // [B]
    float* logprobs;                 // [B]
};

}  // namespace tts
