#pragma once

#include <cstdint>

#include "args/linear.h"
#include "float_tile.h"
#include "isa.h"

TTS_BEGIN_ISA

// Panels [begin, end).
void linear_pack_weight(const PackLinearArgs& args, int64_t begin, int64_t end);

LinearCut linear_cut(int64_t rows, int64_t columns, int64_t depth, DType dtype);
// Packs row tiles [begin, end) of x. All tiles must be packed before the first unit starts.
void linear_pack_x(const LinearArgs& args, int64_t begin, int64_t end);
// Units of work [begin, end).
void linear(const LinearArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
