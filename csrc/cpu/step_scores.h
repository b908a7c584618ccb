#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace tts {

// A PRM head as plain pointers; absent parts have null data. See tts_kernels/score_head.py.
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
    FloatArray hidden;  // [T, H]
    int64_t stride;     // elements from one row of hidden to the next
    int64_t width;      // H
    IndexArray positions;
    HeadArgs head;
    float* rows;      // [S, H] workspace for gathered, normed rows, with a hidden layer only
    float* partials;  // [S, blocks of H1] workspace, with a hidden layer only
    int64_t steps;    // S
    float* out;       // [S]
};

}  // namespace tts

TTS_BEGIN_ISA

// Steps [begin, end) of a one-row head.
void step_scores(const StepScoresArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
