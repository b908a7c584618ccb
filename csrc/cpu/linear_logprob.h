#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

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

// Rows of the weight that one chunk holds: the unit of work and of the sum's order. 21 tiles of 48.
inline constexpr int64_t kVocabularyChunk = 1008;

}  // namespace tts

TTS_BEGIN_ISA

// Chunks [begin, end) of the vocabulary, for every row.
void linear_logprob(const LinearLogprobArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
