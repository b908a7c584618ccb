#pragma once

#include <cstdint>

#include "args/linear_logprob.h"
#include "isa.h"

namespace tts {

// The number of weight rows in a chunk: 21 tiles of 48. A chunk is the unit of work and fixes the order of
// the sum.
inline constexpr int64_t kVocabularyChunk = 1008;

}  // namespace tts

TTS_BEGIN_ISA

// Chunks [begin, end) of the vocabulary, for every row.
void linear_logprob(const LinearLogprobArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
