#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

struct SwigluArgs {
    FloatArray gate_up;  // [T, 2 I]: gate, then up
    int64_t stride;
    int64_t width;  // I
    void* out;      // [T, I]
};

}  // namespace tts
