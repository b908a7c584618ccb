// append_kv_: new tokens into their slots of one layer's caches.
//
//   k, v [T, Hkv, D], slots [T]  ->  cache[slot / page_size, slot % page_size] = k[t], and v alike
//
// One launch, a block of 128 threads for each token: at 8 heads of 128 bfloat16 a thread moves 16 bytes of k
// and 16 of v. Heads that lie next to each other on both sides are one row; a head's row is contiguous in any
// case.
#include "append_kv.h"
#include "block_size.cuh"
#include "copy_rows.cuh"
#include "launch.cuh"
#include "vector.cuh"

namespace tts::cuda {
namespace {

constexpr int kThreads = block_size(128);

template <class Unit>
__device__ void append(const AppendKvArgs& args, int64_t token, int64_t slot) {
    const PagedBytes& to = args.to;
    const int64_t page = slot / to.page_size, offset = slot % to.page_size;
    copy_rows<Unit>({.to = to.data + page * to.page_stride + offset * to.token_stride,
                     .from = args.from + token * args.from_token,
                     .to_stride = to.head_stride,
                     .from_stride = args.from_head,
                     .rows = static_cast<int>(to.heads),
                     .units = static_cast<int>(to.row_bytes / sizeof(Unit))});
}

template <class Unit>
__global__ void __launch_bounds__(kThreads)
    append_kv_kernel(const __grid_constant__ AppendKvArgs k, const __grid_constant__ AppendKvArgs v) {
    const int64_t token = blockIdx.x, slot = at(k.slots, token);
    append<Unit>(k, token, slot);
    append<Unit>(v, token, slot);
}

// A token's heads as one row, where they are.
AppendKvArgs join_heads(AppendKvArgs args) {
    PagedBytes& to = args.to;
    if (args.from_head != to.row_bytes || to.head_stride != to.row_bytes) return args;
    to.row_bytes *= to.heads;
    args.from_head = to.head_stride = to.row_bytes, to.heads = 1;
    return args;
}

bool wide(const AppendKvArgs& args) {
    const PagedBytes& to = args.to;
    return aligned(args.from, args.from_token | args.from_head | to.row_bytes) &&
           aligned(to.data, to.page_stride | to.token_stride | to.head_stride);
}

}  // namespace

void append_kv(const AppendKvArgs& k_in, const AppendKvArgs& v_in, int64_t tokens, cudaStream_t stream) {
    const AppendKvArgs k = join_heads(k_in), v = join_heads(v_in);
    const auto kernel = wide(k) && wide(v) ? append_kv_kernel<uint4> : append_kv_kernel<uint16_t>;
    launch(kernel, tokens, kThreads, 0, stream, k, v);
}

}  // namespace tts::cuda
