#pragma once

#include <cstdint>

#include "args/swiglu.h"
#include "isa.h"

TTS_BEGIN_ISA

// Rows [begin, end).
void swiglu(const SwigluArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
