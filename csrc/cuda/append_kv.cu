// append_kv_: writes new tokens into their slots of one layer's caches.
//
//   k, v [T, Hkv, D], slots [T]  ->  cache[slot / page_size, slot % page_size] = k[t], and the same for v
//
// One launch with a block of 128 threads for each token: at 8 heads of 128 bfloat16 a thread moves 16 bytes
// of k and 16 of v. Heads that are contiguous on both sides are copied as one row; one head's row is always
// contiguous. For quantised and e4m3 caches a warp handles one head at a time (quantize_head.cuh). It reads
// the head for the codes from L1.
#include "append_kv.h"
#include "block_size.cuh"
#include "copy_rows.cuh"
#include "launch.cuh"
#include "quantize_head.cuh"
#include "reduce.cuh"
#include "vector.cuh"

namespace tts::cuda {
namespace {

constexpr int kThreads = block_size(128);

__device__ char* slot_of(const PagedBytes& cache, int64_t slot) {
    return cache.data + slot / cache.page_size * cache.page_stride +
           slot % cache.page_size * cache.token_stride;
}

template <class Unit>
__device__ void append(const AppendKvArgs& args, int64_t token, int64_t slot) {
    const PagedBytes& to = args.to;
    copy_rows<Unit>({.to = slot_of(to, slot),
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

// ---- quantised caches ------------------------------------------------------------------------------------

template <class T>
__device__ void append_head(const AppendKvArgs& args, int64_t token, int64_t slot, int head) {
    const auto* x = reinterpret_cast<const T*>(args.from + token * args.from_token + head * args.from_head);
    quantize_head(x, static_cast<int>(args.head_dim), args.format,
                  slot_of(args.to, slot) + head * args.to.head_stride, args.scales,
                  slot * args.to.heads + head);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    append_quantized_kernel(const __grid_constant__ AppendKvArgs k, const __grid_constant__ AppendKvArgs v) {
    const int64_t token = blockIdx.x, slot = at(k.slots, token);
    const int heads = static_cast<int>(k.to.heads);
    for (int i = warp(); i < 2 * heads; i += kThreads / kWarp) {
        i < heads ? append_head<T>(k, token, slot, i) : append_head<T>(v, token, slot, i - heads);
    }
}

// ---- launches --------------------------------------------------------------------------------------------

// A token's heads as one row, if they are contiguous.
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
    if (k_in.format != KvFormat::plain) {
        return dispatch(k_in.dtype, [&]<class T>(T*) {
            launch(append_quantized_kernel<T>, tokens, kThreads, 0, stream, k_in, v_in);
        });
    }
    const AppendKvArgs k = join_heads(k_in), v = join_heads(v_in);
    const auto kernel = wide(k) && wide(v) ? append_kv_kernel<uint4> : append_kv_kernel<uint16_t>;
    launch(kernel, tokens, kThreads, 0, stream, k, v);
}

}  // namespace tts::cuda
