// The rotary embedding of a head (arXiv 2104.09864). The two halves of a head are the pairs, as for Llama in
// transformers:
//   y[i] = x[i] cos_i - x[i + D/2] sin_i,  y[i + D/2] = x[i + D/2] cos_i + x[i] sin_i,  i < D/2
#pragma once

#include <cstdint>

#include "isa.h"
#include "vec.h"
#include "vec_row.h"

TTS_BEGIN_ISA

// y = rotate(norm(x)), in float32. Without a weight there is no norm.
template <class T>
void rope_head(const T* x, const T* weight, const float* cos_sin, int64_t head_dim, float eps, T* y) {
    const int64_t half = head_dim / 2;
    const Vec factor = Vec::all(weight ? rms_factor(x, head_dim, eps) : 1.0f);
    const auto value = [&](int64_t i, int n) {
        return weight ? load(x + i, n) * factor * load(weight + i, n) : load(x + i, n);
    };
    for_vectors(half, [&](int64_t i, int n) {
        const Vec a = value(i, n), b = value(i + half, n);
        const Vec c = load(cos_sin + i, n), s = load(cos_sin + half + i, n);
        store(a * c - b * s, y + i, n);
        store(fma(a, s, b * c), y + half + i, n);
    });
}

TTS_END_ISA
