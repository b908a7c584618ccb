// copy_pages_: whole pages within a cache, the copies that a fork's first write needs.
//
//   cache [P, page_size, Hkv, D]:  cache[dst] = cache[src]
//
// One memcpy a page where it is contiguous, else one a token or a head.
#include "copy_pages.h"

TTS_BEGIN_ISA

namespace {

void copy(char* to, const char* from, int64_t bytes) {
    __builtin_memcpy(to, from, static_cast<uint64_t>(bytes));
}

}  // namespace

void copy_page(const PageCopyArgs& args, int64_t src, int64_t dst) {
    const int64_t token_bytes = args.heads * args.row_bytes;
    const bool dense_token = args.head == args.row_bytes,
               dense_page = dense_token && args.token == token_bytes;
    const char* from = args.cache + src * args.page;
    char* to = args.cache + dst * args.page;
    if (dense_page) return copy(to, from, args.page_size * token_bytes);
    for (int64_t t = 0; t < args.page_size; ++t, from += args.token, to += args.token) {
        if (dense_token) {
            copy(to, from, token_bytes);
            continue;
        }
        for (int64_t h = 0; h < args.heads; ++h)
            copy(to + h * args.head, from + h * args.head, args.row_bytes);
    }
}

TTS_END_ISA
