#pragma once

#include <cstdint>

#include "aggregate.h"
#include "dtypes.h"
#include "isa.h"

namespace tts {

struct AggregateStepsArgs {
    FloatArray scores;  // [S]
    IndexArray indptr;  // [C + 1], checked
    Aggregate how;
    FloatArray prior;         // [C] aggregates to continue, or null
    IndexArray prior_counts;  // [C]: over how many steps each was taken
    float* out;               // [C]
};

}  // namespace tts

TTS_BEGIN_ISA

// Candidates [begin, end).
void aggregate_steps(const AggregateStepsArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
