// The online log-sum-exp of a row of logits (Milakov and Gimelshein, arXiv 1805.02867).
#pragma once

#include <cstdint>

#include "isa.h"
#include "vec.h"

TTS_BEGIN_ISA

// Folds n <= Block logits, times `scale`, into the state (max, sum). A row with only -inf gives (-inf, 0);
// NaN and +inf give NaN.
template <int Block>
inline void fold_logits(const float* logits, int n, float scale, float& max_state, float& sum_state) {
    constexpr int W = Vec::width;
    static_assert(Block % W == 0);
    float x[Block];
    Vec top = Vec::all(max_state);
    for (int i = 0; i < n; i += W) {
        const int rest = n - i;
        Vec v = Vec::all(-kInfinity);
        if (rest >= W) {
            v = Vec::load(logits + i) * Vec::all(scale);
        } else {
            float lanes[W];
            v.store(lanes);
            for (int l = 0; l < rest; ++l) lanes[l] = logits[i + l] * scale;
            v = Vec::load(lanes);
        }
        v.store(x + i);
        top = max(v, top);
    }
    const float peak = reduce_max(top);
    const float shift = peak == -kInfinity ? 0.0f : peak;
    Vec sum = Vec::zero();
    for (int i = 0; i < n; i += W) sum = sum + exp(Vec::load(x + i) - Vec::all(shift));
    sum_state = sum_state * exp(max_state - shift) + reduce_add(sum);
    max_state = peak;
}

TTS_END_ISA
