// The common part of the operators on rows of few bits.
#pragma once

#include "args/quantize_rows.h"
#include "common.h"

namespace tts::ops {

inline RowFormat row_format(int64_t width, int64_t bits, int64_t group_size) {
    require(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits");
    require(width >= 0 && width % 16 == 0, "width");
    require(group_size >= 1 && group_size <= kMostInGroup && width % group_size == 0, "group_size");
    return {.width = width, .group = group_size, .bits = static_cast<int>(bits)};
}

}  // namespace tts::ops
