#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace tts {

struct SwigluArgs {
    FloatArray gate_up;  // [T, 2 I]: gate, then up
    int64_t stride;
    int64_t width;  // I
    void* out;      // [T, I]
};

}  // namespace tts

TTS_BEGIN_ISA

// Rows [begin, end).
void swiglu(const SwigluArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
