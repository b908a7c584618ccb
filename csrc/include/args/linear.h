#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

struct PackLinearArgs {
    FloatArray weight;  // [N, K]
    int64_t stride;     // elements from one row of weight to the next
    int64_t columns;    // N: columns of the output
    int64_t depth;      // K
    void* out;          // [panels, steps, 16, elements of a step]
};

// How linear cuts its work; this depends on the instruction set. Tiles have nearly equal heights. A unit of
// work takes a block of tiles through a group of panels.
struct LinearCut {
    int64_t tiles, block;   // row tiles in all, and in a block
    int64_t panels, group;  // panels in all, and in a group
    int64_t at_once;        // panels that a tile multiplies at once
    int64_t units;
    int64_t row;     // floats of a packed row
    int64_t packed;  // floats of all packed rows
};

struct LinearArgs {
    FloatArray x;  // [T, K]
    int64_t x_stride;
    const void* weight;    // packed
    int64_t rows;          // T
    int64_t columns;       // N
    int64_t depth;         // K
    FloatArray bias;       // [N] or null
    const void* residual;  // [T, N] of x's type, or null
    int64_t residual_stride;
    LinearCut cut;
    int64_t ahead;  // distance from a thread's current panel to the one that it will take next
    float* packed;  // workspace: rows of x in the order of tiles
    void* out;      // [T, N]
};

}  // namespace tts
