#pragma once

#include "../cpu/sample.h"
#include "stream.h"

namespace tts::cuda {

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

void sample(const SampleArgs& args, cudaStream_t stream);

}  // namespace tts::cuda
