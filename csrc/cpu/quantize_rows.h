#pragma once

#include <cstdint>

#include "args/quantize_rows.h"
#include "isa.h"

TTS_BEGIN_ISA

// Rows [begin, end).
void quantize_rows(const QuantizeRowsArgs& args, int64_t begin, int64_t end);
void dequantize_rows(const DequantizeRowsArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
