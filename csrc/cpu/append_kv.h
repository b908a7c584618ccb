#pragma once

#include <cstdint>

#include "args/append_kv.h"
#include "isa.h"

TTS_BEGIN_ISA

// Tokens [begin, end) of one cache.
void append_kv(const AppendKvArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
