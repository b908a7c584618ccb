#pragma once

#include <cstdint>

#include "args/rms_norm.h"
#include "isa.h"

TTS_BEGIN_ISA

// Rows [begin, end).
void rms_norm(const RmsNormArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
