// A KV cache [pages, page_size, kv_heads, head_dim], as an argument of kernels. Its last dimension is
// contiguous, the others may be strided.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tts {

// With elements; strides are in elements.
struct PagedCache {
    void* data;  // kernels that only read get it from a const tensor
    int64_t page_stride, token_stride, head_stride;
};

// How the D elements of a head are stored. Quantised elements are whole numbers, and the cache consists of
// bytes (for e4m3, too):
//   int8  x = code * scale, codes within 127
//   int4  x = code * scale + zero, codes 0 to 15; byte j holds that of element j and, in its high half,
//         that of element j + D / 2
//   e4m3  x is a float of 8 bits, up to 448. It has an exponent of its own, and so no scale beside it: one
//         would move the range (2**-6 to 448; below, steps of 2**-9), and make no element within it more
//         exact.
enum class KvFormat : int32_t { plain, int8, int4, e4m3 };

// For quantised heads: [pages, page_size, kv_heads], contiguous. int8 has no zeros.
struct KvScales {
    f16 *scale, *zero;
};

// As bytes, for code that moves elements of any type; strides are in bytes.
struct PagedBytes {
    char* data;
    int64_t page_stride, token_stride, head_stride;
    int64_t page_size, heads, row_bytes;  // a row: one head of one token
};

}  // namespace tts
