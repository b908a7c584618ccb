#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

// Rows of numbers with few bits. Each row is contiguous: the codes of all columns, the scales of the groups,
// the zeros of the groups. Codes are stored in planes: 8, 4 and 2 bits in one plane each, and 3 bits in a
// plane of 2 bits for their low bits and one of 1 bit. Byte i of a plane of b bits has the codes of columns
// i, i + w, i + 2 w, ... with w = W b / 8, from its low end on.
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
