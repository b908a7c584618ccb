#pragma once

#include <cstdint>

#include "args/linear_quantized.h"
#include "int_tile.h"
#include "isa.h"
#include "linear_logprob.h"

TTS_BEGIN_ISA

QuantizedCut linear_quantized_cut(int64_t rows, int64_t columns, int64_t depth);
// Quantises rows [begin, end) of x. All rows must be quantised before the first unit starts.
void linear_quantize_x(const LinearQuantizedArgs& args, int64_t begin, int64_t end);
// Units of work [begin, end).
void linear_quantized(const LinearQuantizedArgs& args, int64_t begin, int64_t end);

// Chunks [begin, end) of kVocabularyChunk outputs, for every row.
void linear_logprob_quantized(const QuantizedLogprobArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
