// The last step of every kind of linear.
#pragma once

#include <cstdint>

#include "isa.h"
#include "vec_row.h"

TTS_BEGIN_ISA

// out = sums * scale of the row (if there are scales) + bias + residual, rounded once, for a tile's rows and
// at most `width` columns. The distance between rows of sums is `stride`.
template <class T, class Args>
inline void finish_linear(const Args& args, const float* sums, int64_t stride, const float* scales,
                          int64_t row, int64_t height, int64_t column, int64_t width) {
    const auto* bias = static_cast<const T*>(args.bias.data);
    const auto* residual = static_cast<const T*>(args.residual);
    auto* out = static_cast<T*>(args.out);
    if (width > args.columns - column) width = args.columns - column;
    for (int64_t i = row; i < row + height; ++i, sums += stride) {
        for_vectors(width, [&](int64_t c, int n) {
            Vec y = Vec::load(sums + c);
            if (scales) y = y * Vec::all(scales[i]);
            if (bias) y = y + load(bias + column + c, n);
            if (residual) y = y + load(residual + i * args.residual_stride + column + c, n);
            store(y, out + i * args.columns + column + c, n);
        });
    }
}

TTS_END_ISA
