#pragma once

#include <cstdint>

#include "args/aggregate_steps.h"
#include "isa.h"

TTS_BEGIN_ISA

// Candidates [begin, end).
void aggregate_steps(const AggregateStepsArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
