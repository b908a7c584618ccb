#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

inline constexpr int64_t kMostTop = 128;  // the largest number k of likeliest tokens

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
    SampleOptions same;         // of all rows; arrays that are not null override it:
    const float* temperatures;  // [B] or null, like the following
    IndexArray top_ks;
    const float *top_ps, *min_ps;
    const int64_t *seeds, *offsets;  // [B]
    int64_t* tokens;                 // [B]
    float* logprobs;                 // [B]
    int64_t top;                     // k: number of likeliest tokens to return; 0: none
    int64_t* top_ids;                // [B, k], best first, the lower id first on ties
    float* top_logprobs;             // [B, k]
};

}  // namespace tts
