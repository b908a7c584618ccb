#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

// A PRM head as plain pointers. Missing parts have null data. See tts_kernels/score_head.py.
struct HeadArgs {
    const float* weight;     // [K]: K = H, or H1 with a hidden layer; the difference good - bad
    const float* bias;       // [1] or null
    FloatArray w1;           // [H1, H], the hidden layer: Linear + ReLU
    FloatArray b1;           // [H1] or null
    int64_t hidden_width;    // H1, 0 without a hidden layer
    FloatArray norm_weight;  // [H] or null: RMSNorm before the head
    float eps;
    bool sigmoid;
};

struct StepScoresArgs {
    FloatArray hidden;     // [T, H]
    int64_t stride;        // elements from one row of hidden to the next
    int64_t width;         // H
    IndexArray positions;  // [S]
    int64_t steps;         // S
    HeadArgs head;
    float* out;  // [S]
    // With a hidden layer only:
    void* rows;       // CPU: [S, H] gathered rows after the norm: bfloat16 if `bf16_rows`, else float32
    bool bf16_rows;   // CPU: hidden and w1 are bfloat16, and there is no norm, whose results are float32
    float* partials;  // [blocks, S]: the part of the logits from each block of hidden units
};

}  // namespace tts
