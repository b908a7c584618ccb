// A KV cache [pages, page_size, kv_heads, head_dim], as kernels see it. Its last dimension is contiguous, the
// others may be strided.
#pragma once

#include <cstdint>

namespace tts {

// As elements; strides in elements.
struct PagedCache {
    void* data;  // kernels that only read get it from a const tensor
    int64_t page_stride, token_stride, head_stride;
};

// As bytes, for what moves elements of any type; strides in bytes.
struct PagedBytes {
    char* data;
    int64_t page_stride, token_stride, head_stride;
    int64_t page_size, heads, row_bytes;  // a row: one head of one token
};

}  // namespace tts
