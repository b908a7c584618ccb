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
#include "quantized_rows.h"
#include "vec.h"
#include "vec_row.h"

TTS_BEGIN_ISA

namespace {

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
    for (int64_t g = 0; g < format.width / format.group; ++g) {
        dequantize_group(row, format, g, x + g * format.group);
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
