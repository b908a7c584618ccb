// How rows are cut into register tiles.
#pragma once

#include <cstdint>

#include "isa.h"

TTS_BEGIN_ISA

// `count` tiles of nearly equal height: whole units of rows, with at most one unit of difference. The last
// unit may be short.
struct RowTiles {
    int64_t rows, count, unit = 1;

    int64_t begin(int64_t tile) const {
        const int64_t units = (rows + unit - 1) / unit, extra = units % count;
        const int64_t first = (tile * (units / count) + (tile < extra ? tile : extra)) * unit;
        return first < rows ? first : rows;
    }
    int64_t height(int64_t tile) const { return begin(tile + 1) - begin(tile); }
};

TTS_END_ISA
