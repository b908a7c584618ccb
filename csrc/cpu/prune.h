#pragma once

#include <cstdint>

#include "args/prune.h"
#include "isa.h"

namespace tts {

// A group is pruned without a workspace if at most this many survive.
inline constexpr int64_t kFewSurvivors = 16;

}  // namespace tts

TTS_BEGIN_ISA

// Groups [begin, end).
void prune(const PruneArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
