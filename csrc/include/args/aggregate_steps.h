#pragma once

#include <cstdint>

#include "aggregate.h"
#include "dtypes.h"

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
