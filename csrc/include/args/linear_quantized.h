#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

// A weight matrix of whole numbers (int_tile.h). The stored number is the number plus `2**(bits - 1)`. Zero
// points are subtracted from the number.
struct QuantizedWeight {
    const uint8_t* data;  // [panels, depth / 4 (8 for 4 bits), 16, 4]
    const float* scale;   // [panels, groups, 16]
    const float* zero;    // [panels, groups, 16] or null
    int64_t bits;         // 8 or 4
    int64_t depth;        // K, padded to whole blocks
    int64_t group;        // columns with one scale; the last group may be short
    int64_t groups;
};

// Four elements of a row that are outliers: 128 times the bytes of `word` are added to the numbers at their
// place.
struct Outlier {
    int32_t step;  // their place along the depth, in units of four
    int32_t word;
};

// How the work is cut; this depends on the instruction set. A unit takes a block of row tiles through a group
// of panels.
struct QuantizedCut {
    int64_t tiles, block;   // row tiles in all, and in a block
    int64_t panels, group;  // panels in all, and in a group
    int64_t units;
    int64_t row_bytes;    // of a row in a tile's order
    int64_t packed_rows;  // number of all rows, the last tile padded
    int64_t outliers;     // most outliers of a row; 0 if rows are stored in 16 bits
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
    int64_t ahead;      // distance from a thread's current panel to the one that it will take next
    int8_t* packed;     // workspace: rows of x as whole numbers, in the order of tiles
    float* scales;      // workspace [T]: the scale of each row
    int32_t* totals;    // workspace [T, groups]: the sum of a row's numbers in each group
    Outlier* outliers;  // workspace [T, cut.outliers]: a row's outliers in the order of their steps
    int32_t* starts;    // workspace [T, groups + 1]: where the outliers of each group begin
    void* out;          // [T, N]
};

// linear_logprob with such weights. The rows and the weight are those of `linear`, the rest is as in
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
