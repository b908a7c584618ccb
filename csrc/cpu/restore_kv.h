#pragma once

#include <cstdint>

#include "args/restore_kv.h"
#include "isa.h"

TTS_BEGIN_ISA

// Heads [begin, end) of all blocks; a block has num_kv_heads of them.
void restore_kv(const RestoreKvArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
