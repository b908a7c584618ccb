#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

struct PruneArgs {
    FloatArray scores;  // [S]
    IndexArray indptr;  // [G + 1], checked
    IndexArray k;       // [G] in [0, width], or null: `width` for every group
    int64_t width;      // K
    bool keep_order;
    int32_t* keys;     // [S] workspace of the CPU kernel if width > kFewSurvivors
    int64_t* indices;  // [G, K]
    int32_t* counts;   // [G]
};

}  // namespace tts
