#pragma once

#include <cstdint>

#include "args/step_scores.h"
#include "isa.h"

namespace tts {

// The number of hidden units in one block of an MLP head: the unit of work, which also fixes the order of the
// sum.
inline constexpr int64_t kHiddenBlock = 48;

}  // namespace tts

TTS_BEGIN_ISA

// Steps [begin, end) of a one-row head.
void step_scores(const StepScoresArgs& args, int64_t begin, int64_t end);

// A head with a hidden layer, in three passes: gather steps [begin, end); process blocks [begin, end) of
// hidden units for all steps; finish steps [begin, end).
void step_scores_gather(const StepScoresArgs& args, int64_t begin, int64_t end);
void step_scores_hidden(const StepScoresArgs& args, int64_t begin, int64_t end);
void step_scores_finish(const StepScoresArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
