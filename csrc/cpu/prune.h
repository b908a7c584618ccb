#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace tts {

// Up to this many survivors a group is pruned without a workspace.
inline constexpr int64_t kFewSurvivors = 16;

struct PruneArgs {
    FloatArray scores;  // [S]
    IndexArray indptr;  // [G + 1], checked
    IndexArray k;       // [G] in [0, width], or null: `width` for every group
    int64_t width;      // K
    bool keep_order;
    int32_t* keys;     // [S] workspace if width > kFewSurvivors
    int64_t* indices;  // [G, K]
    int32_t* counts;   // [G]
};

}  // namespace tts

TTS_BEGIN_ISA

// Groups [begin, end).
void prune(const PruneArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
