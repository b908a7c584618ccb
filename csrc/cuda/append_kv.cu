// append_kv_: new tokens into their slots of one layer's caches.
//
//   k, v [T, Hkv, D], slots [T]  ->  cache[slot / page_size, slot % page_size] = k[t], and v alike
//
// One launch, a block of 128 threads a token: at 8 heads of 128 bfloat16 a thread moves 16 bytes of k and 16
// of v. Heads that lie next to each other on both sides are one row; a head's row is contiguous in any case.
#include "append_kv.h"
#include "launch.cuh"
#include "rows.cuh"
#include "vector.cuh"

namespace tts::cuda {
namespace {

constexpr int kThreads = 128;

template <class Unit>
__device__ void append(const AppendArgs& args, int64_t token, int64_t slot) {
    const int64_t page = slot / args.page_size, offset = slot % args.page_size;
    copy_rows<Unit>({.to = args.to + page * args.to_page + offset * args.to_token,
                     .from = args.from + token * args.from_token,
                     .to_stride = args.to_head,
                     .from_stride = args.from_head,
                     .rows = static_cast<int>(args.heads),
                     .units = static_cast<int>(args.row_bytes / sizeof(Unit))});
}

template <class Unit>
__global__ void __launch_bounds__(kThreads)
    append_kv_kernel(const __grid_constant__ AppendArgs k, const __grid_constant__ AppendArgs v) {
    const int64_t token = blockIdx.x, slot = at(k.slots, token);
    append<Unit>(k, token, slot);
    append<Unit>(v, token, slot);
}

// A token's heads as one row, where they are.
AppendArgs join_heads(AppendArgs args) {
    if (args.from_head != args.row_bytes || args.to_head != args.row_bytes) return args;
    args.row_bytes *= args.heads;
    args.from_head = args.to_head = args.row_bytes, args.heads = 1;
    return args;
}

bool wide(const AppendArgs& args) {
    return aligned(args.from, args.from_token | args.from_head | args.row_bytes) &&
           aligned(args.to, args.to_page | args.to_token | args.to_head);
}

}  // namespace

void append_kv(const AppendArgs& k_in, const AppendArgs& v_in, int64_t tokens, cudaStream_t stream) {
    const AppendArgs k = join_heads(k_in), v = join_heads(v_in);
    const auto kernel = wide(k) && wide(v) ? append_kv_kernel<uint4> : append_kv_kernel<uint16_t>;
    launch(kernel, tokens, kThreads, 0, stream, k, v);
}

}  // namespace tts::cuda
