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

TTS_HD inline SampleOptions options_of(const SampleArgs& args, int64_t row) {
    SampleOptions options = args.same;
    if (args.temperatures) options.temperature = args.temperatures[row];
    if (args.top_ks.data) options.top_k = at(args.top_ks, row);
    if (args.top_ps) options.top_p = args.top_ps[row];
    if (args.min_ps) options.min_p = args.min_ps[row];
    options.seed = args.seeds[row];
    options.offset = args.offsets[row];
    return options;
}

}  // namespace tts::cuda
