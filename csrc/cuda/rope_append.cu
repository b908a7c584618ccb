// rope_append_: all work between the projection of q, k, v and the attention, in one launch.
//
//   qkv [T, (Hq + 2 Hkv) D]  ->  q [T, Hq, D], and k, v into the cache slots of their tokens
//
// q and k get an optional RMSNorm for each head (Qwen3), then the rotary embedding (arXiv 2104.09864). The
// two halves of a head are the pairs, as for Llama in transformers:
//   y[i] = x[i] cos_i - x[i + D/2] sin_i,  y[i + D/2] = x[i + D/2] cos_i + x[i] sin_i,  i < D/2
//
// A warp handles a head of a token, so its bits do not depend on others: at D = 128 a lane has two pairs. A
// block has four heads of one token, since a decode step has few tokens. A head with a norm is read once for
// its squares, and again, from L1, for the rotation. For a quantised cache a warp keeps its rotated head of
// keys, rounded to qkv's type, in shared memory, and quantises it from there as append_kv_ would.
#include "block_size.cuh"
#include "launch.cuh"
#include "quantize_head.cuh"
#include "reduce.cuh"
#include "rope_append.h"
#include "vector.cuh"

namespace tts::cuda {
namespace {

constexpr int kThreads = block_size(128), kWarps = kThreads / kWarp;

// The factor of a head's norm: 1 / sqrt(mean of squares + eps).
template <class T>
__device__ float norm_factor(const T* x, int dim, float eps) {
    float squares = 0.0f;
    for (int d = lane(); d < dim; d += kWarp) {
        const float v = to_float(x[d]);
        squares = fmaf(v, v, squares);
    }
    squares = reduce_lanes(squares, Add());
    return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(squares, static_cast<float>(dim)), eps)));
}

// One head, with one warp: y = rotate(norm(x)), in float32, rounded once. Without a weight there is no norm.
// `angles` [D]: the cosines of the token's position, then the sines.
template <class T>
__device__ void rope_head(const T* x, const T* weight, const float* angles, int dim, float eps, T* y) {
    const int half = dim / 2;
    const float factor = weight ? norm_factor(x, dim, eps) : 1.0f;
    const auto value = [&](int d) {
        const float v = to_float(x[d]);
        return weight ? __fmul_rn(__fmul_rn(v, factor), to_float(weight[d])) : v;
    };
#pragma unroll 2  // nvcc spills for sm_80 with more
    for (int i = lane(); i < half; i += kWarp) {
        const float a = value(i), b = value(half + i), cosine = angles[i], sine = angles[half + i];
        y[i] = from_float<T>(__fsub_rn(__fmul_rn(a, cosine), __fmul_rn(b, sine)));
        y[half + i] = from_float<T>(fmaf(a, sine, __fmul_rn(b, cosine)));
    }
}

template <class T>
__device__ T* at_slot(const PagedCache& cache, int64_t slot, int64_t page_size, int head) {
    return static_cast<T*>(cache.data) + slot / page_size * cache.page_stride +
           slot % page_size * cache.token_stride + head * cache.head_stride;
}

// The head of a warp: x [D] of qkv, its index among those of its kind, and where its token's things are.
template <class T>
struct Head {
    const T* x;
    const float* angles;
    int64_t token, slot;
    int of_q, of_k, of_v;  // of_k and of_v are negative for the kinds before; there is none with of_v >= Hkv

    __device__ Head(const RopeAppendArgs& args, int blocks) {
        token = blockIdx.x / blocks;
        of_q = static_cast<int>(blockIdx.x % blocks) * kWarps + warp();
        of_k = of_q - static_cast<int>(args.num_q_heads);
        of_v = of_k - static_cast<int>(args.num_kv_heads);
        slot = at(args.slots, token);
        angles = args.cos_sin + at(args.positions, token) * args.head_dim;
        x = static_cast<const T*>(args.qkv.data) + token * args.stride + of_q * args.head_dim;
    }

    // Norm and rotation of a head of q or k.
    __device__ void rotate(const RopeAppendArgs& args, T* to) const {
        const void* weight = of_k < 0 ? args.q_norm : args.k_norm;
        if (of_k < 0) to = static_cast<T*>(args.q) + (token * args.num_q_heads + of_q) * args.head_dim;
        rope_head(x, static_cast<const T*>(weight), angles, static_cast<int>(args.head_dim), args.eps, to);
    }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    rope_append_kernel(const __grid_constant__ RopeAppendArgs args, int blocks) {
    const Head<T> head(args, blocks);
    if (head.of_v >= args.num_kv_heads) return;
    if (head.of_v < 0) {
        T* to = head.of_k < 0 ? nullptr : at_slot<T>(args.k_cache, head.slot, args.page_size, head.of_k);
        return head.rotate(args, to);
    }
    T* to = at_slot<T>(args.v_cache, head.slot, args.page_size, head.of_v);
    for (int d = lane(); d < args.head_dim; d += kWarp) to[d] = head.x[d];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rope_append_quantized_kernel(const __grid_constant__ RopeAppendArgs args, int blocks) {
    extern __shared__ uint4 staged[];  // [kWarps, D] of T
    const int dim = static_cast<int>(args.head_dim);
    const Head<T> head(args, blocks);
    if (head.of_v >= args.num_kv_heads) return;
    T* rotated = reinterpret_cast<T*>(staged) + warp() * dim;
    if (head.of_v < 0) head.rotate(args, rotated);
    if (head.of_k < 0) return;
    __syncwarp();
    const bool is_v = head.of_v >= 0;
    const int of_kv = is_v ? head.of_v : head.of_k;
    char* codes = at_slot<char>(is_v ? args.v_cache : args.k_cache, head.slot, args.page_size, of_kv);
    quantize_head(is_v ? head.x : rotated, dim, args.format, codes, is_v ? args.v_scales : args.k_scales,
                  head.slot * args.num_kv_heads + of_kv);
}

}  // namespace

void rope_append(const RopeAppendArgs& args, int64_t tokens, cudaStream_t stream) {
    const int64_t blocks = divide_up(args.num_q_heads + 2 * args.num_kv_heads, kWarps);  // of a token
    dispatch(args.qkv.dtype, [&]<class T>(T*) {
        const bool plain = args.format == KvFormat::plain;
        const int64_t shared = plain ? 0 : kWarps * args.head_dim * static_cast<int64_t>(sizeof(T));
        launch(plain ? rope_append_kernel<T> : rope_append_quantized_kernel<T>, tokens * blocks, kThreads,
               static_cast<int>(shared), stream, args, static_cast<int>(blocks));
    });
}

}  // namespace tts::cuda
