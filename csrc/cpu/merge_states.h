#pragma once

#include <cstdint>

#include "args/merge_states.h"
#include "isa.h"

TTS_BEGIN_ISA

// Rows [begin, end).
void merge_states(const MergeStatesArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
