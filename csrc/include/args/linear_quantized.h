#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

// A weight matrix of whole numbers (int_tile.h). A stored number is `2**(bits - 1)` above the value that it
// stands for; zero points come off that value.
struct QuantizedWeight {
    const uint8_t* data;  // [panels, depth / 4 (8 for 4 bits), 16, 4]
    const float* scale;   // [panels, groups, 16]
    const float* zero;    // [panels, groups, 16] or null
    int64_t bits;         // 8 or 4
    int64_t depth;        // K, padded to whole blocks
    int64_t group;        // of the depth with one scale; the last one may be short
    int64_t groups;
};

// Four elements of a row, of which 128 times `word`'s bytes come on top of what stands in their place.
struct Outlier {
    int32_t step;  // their place along the depth, by fours
    int32_t word;
};

// How the work is cut, by the instruction set: a unit is a block of row tiles through a group of panels.
struct QuantizedCut {
    int64_t tiles, block;   // row tiles in all, and in a block
    int64_t panels, group;  // panels in all, and in a group
    int64_t units;
    int64_t row_bytes;    // of a row in a tile's order
    int64_t packed_rows;  // all rows, the last tile filled up
    int64_t outliers;     // of a row at most; 0 where rows are held in 16 bits
};

struct LinearQuantizedArgs {
    FloatArray x;  // [T, K]
    int64_t x_stride;
    QuantizedWeight weight;
    int64_t rows;          // T
    int64_t columns;       // N
    int64_t depth;         // K
    FloatArray bias;       // [N] or null
    const void* residual;  // [T, N] of x's type, or null
    int64_t residual_stride;
    QuantizedCut cut;
    int64_t ahead;      // panels from one that a thread is at to the one that it will take next
    int8_t* packed;     // workspace: rows of x in whole numbers, tile by tile
    float* scales;      // workspace [T]: what a row's whole numbers are multiples of
    int32_t* totals;    // workspace [T, groups]: their sum in each group
    Outlier* outliers;  // workspace [T, cut.outliers]: a row's, in the order of their steps
    int32_t* starts;    // workspace [T, groups + 1]: where those of a group begin
    void* out;          // [T, N]
};

// linear_logprob on such weights: the rows and the weight are those of `linear`, the rest as in
// LinearLogprobArgs.
struct QuantizedLogprobArgs {
    LinearQuantizedArgs linear;
    IndexArray targets;     // [T]
    float inv_temperature;  // 1 / temperature
    float* max;             // [chunks, T]
    float* sum;             // [chunks, T]
    float* target;          // [T]
};

}  // namespace tts
