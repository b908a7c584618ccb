// quantize_rows, dequantize_rows: whole numbers of e bits for the numbers of a row, in groups, each between
// its smallest and largest number (the asymmetric uniform quantiser of KIVI, arXiv 2402.02750, and XQuant,
// 2508.10395).
//
//   zero = min x, scale = (max x - min x) / (2^e - 1), code = (x - zero) / scale;   x ~ code * scale + zero
//
// args/quantize_rows.h describes the bytes of a row, quantized_kv.h the rounding of scale, zero and codes; an
// int4 head there is a row of one group. The codes of a group are in a buffer of one byte each before they go
// to the planes.
#include "quantize_rows.h"

#include "quantized_kv.h"
#include "vec.h"
#include "vec_row.h"

TTS_BEGIN_ISA

namespace {

struct Plane {
    int bits, shift;  // of a code
    int64_t begin;    // byte of the row
};

// Calls f(plane) for the planes of a format.
template <class F>
void for_planes(const RowFormat& format, F f) {
    if (format.bits != 3) return f(Plane{format.bits, 0, 0});
    f(Plane{2, 0, 0});
    f(Plane{1, 2, format.width / 4});
}

// Calls f(byte, count, column, shift) for runs of a plane's bytes that hold `count` columns from `first` on.
// `byte` has its part of column `first + column`, shifted left by `shift` bits; the next bytes have the next
// columns.
template <class F>
void for_runs(const RowFormat& format, const Plane& plane, int64_t first, int64_t count, F f) {
    const int64_t width = format.width * plane.bits / 8;
    for (int64_t column = first; column < first + count;) {
        const int64_t turn = column / width, in_turn = column - turn * width;
        const int64_t run =
            width - in_turn < first + count - column ? width - in_turn : first + count - column;
        f(plane.begin + in_turn, run, column - first, static_cast<int>(turn) * plane.bits);
        column += run;
    }
}

template <class T>
void quantize_row(const T* x, const RowFormat& format, uint8_t* row) {
    __builtin_memset(row, 0, static_cast<uint64_t>(format.code_bytes()));
    const int64_t groups = format.width / format.group;
    const float most = static_cast<float>((1 << format.bits) - 1);
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * format.group;
        const Affine affine = affine_of(range_of(x + first, format.group), most);
        uint8_t* numbers = row + format.code_bytes() + 2 * g;
        __builtin_memcpy(numbers, &affine.scale, 2);
        __builtin_memcpy(numbers + 2 * groups, &affine.zero, 2);
        uint8_t codes[kMostInGroup];
        const Encoder encode(to_float(affine.scale), to_float(affine.zero), 0.0f, most);
        for_vectors(format.group, [&](int64_t i, int n) { encode(x + first + i, n, codes + i); });
        for_planes(format, [&](const Plane& plane) {
            const int mask = (1 << plane.bits) - 1;
            for_runs(format, plane, first, format.group, [&](int64_t byte, int64_t n, int64_t at, int shift) {
                for (int64_t i = 0; i < n; ++i) {
                    const int part = codes[at + i] >> plane.shift & mask;
                    row[byte + i] = static_cast<uint8_t>(row[byte + i] | part << shift);
                }
            });
        });
    }
}

template <class T>
void dequantize_row(const uint8_t* row, const RowFormat& format, T* x) {
    const int64_t groups = format.width / format.group;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * format.group;
        uint8_t codes[kMostInGroup];
        for_planes(format, [&](const Plane& plane) {
            const int mask = (1 << plane.bits) - 1;
            for_runs(format, plane, first, format.group, [&](int64_t byte, int64_t n, int64_t at, int shift) {
                for (int64_t i = 0; i < n; ++i) {
                    const int part = (row[byte + i] >> shift & mask) << plane.shift;
                    codes[at + i] = static_cast<uint8_t>(plane.shift ? codes[at + i] | part : part);
                }
            });
        });
        const uint8_t* numbers = row + format.code_bytes() + 2 * g;
        Affine affine;
        __builtin_memcpy(&affine.scale, numbers, 2);
        __builtin_memcpy(&affine.zero, numbers + 2 * groups, 2);
        const Vec scale = Vec::all(affine.scale), zero = Vec::all(affine.zero);
        const char* from = reinterpret_cast<const char*>(codes);
        for_vectors(format.group, [&](int64_t i, int n) {
            store(fma(CodeBytes::load(from + i, n).uint8(), scale, zero), x + first + i, n);
        });
    }
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
    dispatch(args.x.dtype, [&]<class T>(T*) {
        for (int64_t n = begin; n < end; ++n) {
            quantize_row(static_cast<const T*>(args.x.data) + n * args.stride, args.format,
                         args.out + n * args.format.bytes());
        }
    });
}

void dequantize_rows(const DequantizeRowsArgs& args, int64_t begin, int64_t end) {
    dispatch(args.dtype, [&]<class T>(T*) {
        for (int64_t n = begin; n < end; ++n) {
            dequantize_row(args.rows + n * args.stride, args.format,
                           static_cast<T*>(args.out) + n * args.format.width);
        }
    });
}

TTS_END_ISA
