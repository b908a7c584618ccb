#pragma once

#include <cstdint>

#include "args/linear_logprob.h"
#include "isa.h"

namespace tts {

// Rows of the weight that one chunk holds: the unit of work and of the sum's order. 21 tiles of 48.
inline constexpr int64_t kVocabularyChunk = 1008;

}  // namespace tts

TTS_BEGIN_ISA

// Chunks [begin, end) of the vocabulary, for every row.
void linear_logprob(const LinearLogprobArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
