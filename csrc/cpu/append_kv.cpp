// append_kv_: writes new tokens into their slots of one layer's cache.
//
//   k [T, Hkv, D], slots [T]  ->  k_cache[slot / page_size, slot % page_size] = k[t]
//
// Copies T rows of Hkv * D elements, with one memcpy for each token if the heads are contiguous on both
// sides. For a quantised cache, each head is quantised separately.
#include "append_kv.h"

#include "quantized_kv.h"

TTS_BEGIN_ISA

namespace {

void append_quantized(const AppendKvArgs& args, int64_t begin, int64_t end) {
    const PagedBytes& to = args.to;
    dispatch(args.dtype, [&]<class T>(T*) {
        for (int64_t t = begin; t < end; ++t) {
            const int64_t slot = at(args.slots, t), page = slot / to.page_size, offset = slot % to.page_size;
            const char* from = args.from + t * args.from_token;
            char* token = to.data + page * to.page_stride + offset * to.token_stride;
            for (int64_t head = 0; head < to.heads; ++head) {
                quantize_head(reinterpret_cast<const T*>(from + head * args.from_head), args.head_dim,
                              args.format, token + head * to.head_stride, args.scales,
                              slot * to.heads + head);
            }
        }
    });
}

}  // namespace

void append_kv(const AppendKvArgs& args, int64_t begin, int64_t end) {
    if (args.format != KvFormat::plain) return append_quantized(args, begin, end);
    const PagedBytes& to = args.to;
    const bool dense = args.from_head == to.row_bytes && to.head_stride == to.row_bytes;
    const int64_t pieces = dense ? 1 : to.heads, bytes = dense ? to.heads * to.row_bytes : to.row_bytes;
    for (int64_t t = begin; t < end; ++t) {
        const int64_t slot = at(args.slots, t), page = slot / to.page_size, offset = slot % to.page_size;
        const char* from = args.from + t * args.from_token;
        char* token = to.data + page * to.page_stride + offset * to.token_stride;
        for (int64_t i = 0; i < pieces; ++i) {
            __builtin_memcpy(token + i * to.head_stride, from + i * args.from_head,
                             static_cast<uint64_t>(bytes));
        }
    }
}

TTS_END_ISA
