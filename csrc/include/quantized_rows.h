// Rows of whole numbers of few bits, as args/quantize_rows.h describes their bytes.
#pragma once

#include <cstdint>

#include "args/quantize_rows.h"
#include "isa.h"
#include "quantized_kv.h"
#include "vec.h"
#include "vec_row.h"

TTS_BEGIN_ISA

struct Plane {
    int bits, shift;  // of a code
    int64_t begin;    // byte of the row
};

// Calls f(plane) for the planes of a format.
template <class F>
inline void for_planes(const RowFormat& format, F f) {
    if (format.bits != 3) return f(Plane{format.bits, 0, 0});
    f(Plane{2, 0, 0});
    f(Plane{1, 2, format.width / 4});
}

// Calls f(byte, count, column, shift) for runs of a plane's bytes that hold `count` columns from `first` on.
// `byte` has its part of column `first + column`, shifted left by `shift` bits; the next bytes have the next
// columns.
template <class F>
inline void for_runs(const RowFormat& format, const Plane& plane, int64_t first, int64_t count, F f) {
    const int64_t width = format.width * plane.bits / 8;
    for (int64_t column = first; column < first + count;) {
        const int64_t turn = column / width, in_turn = column - turn * width;
        const int64_t run =
            width - in_turn < first + count - column ? width - in_turn : first + count - column;
        f(plane.begin + in_turn, run, column - first, static_cast<int>(turn) * plane.bits);
        column += run;
    }
}

// The codes of a group, a byte each.
inline void codes_of_group(const uint8_t* row, const RowFormat& format, int64_t g, uint8_t* codes) {
    for_planes(format, [&](const Plane& plane) {
        const int mask = (1 << plane.bits) - 1;
        for_runs(format, plane, g * format.group, format.group,
                 [&](int64_t byte, int64_t n, int64_t at, int shift) {
                     for (int64_t i = 0; i < n; ++i) {
                         const int part = (row[byte + i] >> shift & mask) << plane.shift;
                         codes[at + i] = static_cast<uint8_t>(plane.shift ? codes[at + i] | part : part);
                     }
                 });
    });
}

// The scale and zero of a group.
inline Affine affine_of_group(const uint8_t* row, const RowFormat& format, int64_t g) {
    const uint8_t* numbers = row + format.code_bytes() + 2 * g;
    Affine affine;
    __builtin_memcpy(&affine.scale, numbers, 2);
    __builtin_memcpy(&affine.zero, numbers + 2 * (format.width / format.group), 2);
    return affine;
}

// The numbers of a group, to x.
template <class T>
inline void dequantize_group(const uint8_t* row, const RowFormat& format, int64_t g, T* x) {
    const Affine affine = affine_of_group(row, format, g);
    const Vec scale = Vec::all(affine.scale), zero = Vec::all(affine.zero);
    const char* codes = reinterpret_cast<const char*>(row);
    const int64_t first = g * format.group;
    if (format.bits != 3) {
        const int mask = (1 << format.bits) - 1;
        return for_runs(format, {format.bits, 0, 0}, first, format.group,
                        [&](int64_t byte, int64_t n, int64_t at, int shift) {
                            decode(codes + byte, n, x + at,
                                   [&](CodeBytes b) { return fma(b.bits(shift, mask), scale, zero); });
                        });
    }
    // A run of the high bits lies within one of the low bits, whose plane is twice as wide.
    const int64_t width = format.width / 4;
    for_runs(format, {1, 2, width}, first, format.group, [&](int64_t byte, int64_t n, int64_t at, int shift) {
        const int64_t turn = (first + at) / width;
        const char *low = codes + first + at - turn * width, *high = codes + byte;
        for_vectors(n, [&](int64_t i, int m) {
            const Vec two = CodeBytes::load(low + i, m).bits(static_cast<int>(2 * turn), 3);
            const Vec code = fma(CodeBytes::load(high + i, m).bits(shift, 1), Vec::all(4.0f), two);
            store(fma(code, scale, zero), x + at + i, m);
        });
    });
}

TTS_END_ISA
