// append_kv_: new tokens into their slots of one layer's cache.
//
//   k [T, Hkv, D], slots [T]  ->  k_cache[slot / page_size, slot % page_size] = k[t]
//
// A copy of T rows of Hkv * D elements, one memcpy a token where both sides have their heads next to each
// other.
#include "append_kv.h"

TTS_BEGIN_ISA

void append_kv(const AppendArgs& args, int64_t begin, int64_t end) {
    const bool dense = args.from_head == args.row_bytes && args.to_head == args.row_bytes;
    const int64_t pieces = dense ? 1 : args.heads,
                  bytes = dense ? args.heads * args.row_bytes : args.row_bytes;
    for (int64_t t = begin; t < end; ++t) {
        const int64_t slot = at(args.slots, t), page = slot / args.page_size, offset = slot % args.page_size;
        const char* from = args.from + t * args.from_token;
        char* to = args.to + page * args.to_page + offset * args.to_token;
        for (int64_t i = 0; i < pieces; ++i) {
            __builtin_memcpy(to + i * args.to_head, from + i * args.from_head, static_cast<uint64_t>(bytes));
        }
    }
}

TTS_END_ISA
