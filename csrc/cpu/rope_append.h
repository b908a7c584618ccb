#pragma once

#include <cstdint>

#include "args/rope_append.h"
#include "isa.h"

TTS_BEGIN_ISA

// Tokens [begin, end).
void rope_append(const RopeAppendArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
