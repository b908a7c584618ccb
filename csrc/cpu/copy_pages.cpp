// copy_pages_: copies whole pages within a cache, which is needed before a fork's first write.
//
//   cache [P, page_size, Hkv, D]:  cache[dst] = cache[src]
//
// One memcpy for each page if it is contiguous, else one for each token or head.
#include "copy_pages.h"

TTS_BEGIN_ISA

namespace {

void copy(char* to, const char* from, int64_t bytes) {
    __builtin_memcpy(to, from, static_cast<uint64_t>(bytes));
}

}  // namespace

void copy_page(const PagedBytes& cache, int64_t src, int64_t dst) {
    const int64_t token_bytes = cache.heads * cache.row_bytes;
    const bool dense_token = cache.head_stride == cache.row_bytes,
               dense_page = dense_token && cache.token_stride == token_bytes;
    const char* from = cache.data + src * cache.page_stride;
    char* to = cache.data + dst * cache.page_stride;
    if (dense_page) return copy(to, from, cache.page_size * token_bytes);
    for (int64_t t = 0; t < cache.page_size; ++t, from += cache.token_stride, to += cache.token_stride) {
        if (dense_token) {
            copy(to, from, token_bytes);
            continue;
        }
        for (int64_t h = 0; h < cache.heads; ++h) {
            copy(to + h * cache.head_stride, from + h * cache.head_stride, cache.row_bytes);
        }
    }
}

TTS_END_ISA
