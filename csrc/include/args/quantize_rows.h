#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

// Rows of numbers in few bits, in one piece of memory each: the codes of all columns, the scales of the
// groups, their zeros. Codes stand in planes: 8 bits in one of 8, 4 in one of 4, 2 in one of 2, and 3 in one
// of 2, for their low bits, and one of 1. Byte i of a plane of b bits has those of columns i, i + w, i + 2 w,
// ... for w = W b / 8, from its low end on.
struct RowFormat {
    int64_t width;  // W, a multiple of 16 and of group
    int64_t group;  // columns that share a scale, at most kMostInGroup
    int bits;       // 2, 3, 4 or 8

    int64_t code_bytes() const { return width * bits / 8; }
    int64_t bytes() const { return code_bytes() + width / group * 4; }
};

constexpr int64_t kMostInGroup = 128;

struct QuantizeRowsArgs {
    FloatArray x;  // [N, W]
    int64_t stride;
    RowFormat format;
    uint8_t* out;  // [N, bytes]
};

struct DequantizeRowsArgs {
    const uint8_t* rows;  // [N, bytes]
    int64_t stride;
    RowFormat format;
    DType dtype;
    void* out;  // [N, W]
};

}  // namespace tts
