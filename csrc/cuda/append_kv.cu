// append_kv_: writes new tokens into their slots of one layer's caches.
//
//   k, v [T, Hkv, D], slots [T]  ->  cache[slot / page_size, slot % page_size] = k[t], and the same for v
//
// One launch with a block of 128 threads for each token: at 8 heads of 128 bfloat16 a thread moves 16 bytes
// of k and 16 of v. Heads that are contiguous on both sides are copied as one row; one head's row is always
// contiguous. For quantised caches (format and rounding: csrc/include/quantized_kv.h) a warp handles one head
// at a time. It reads the head once for the range, and again, from L1, for the codes. For e4m3 caches it
// writes the nearest bytes, without a range.
#include "append_kv.h"
#include "block_size.cuh"
#include "copy_rows.cuh"
#include "e4m3.cuh"
#include "kv_numbers.h"
#include "launch.cuh"
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

struct Least {
    __device__ float operator()(float a, float b) const { return fminf(a, b); }
};
struct Greatest {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class T>
__device__ HeadRange range_of(const T* x, int dim) {
    float low = to_float(x[0]), high = low;
    bool finite = true;
    for (int d = lane(); d < dim; d += kWarp) {
        const float v = to_float(x[d]);
        low = fminf(v, low), high = fmaxf(v, high), finite = finite && v - v == 0.0f;
    }
    return {reduce_lanes(low, Least()), reduce_lanes(high, Greatest()), __all_sync(kAllLanes, finite) != 0};
}

// The code of an element, rounded to nearest even; 0 if the scale is 0 or NaN.
struct Encode {
    float scale, zero, low, high;

    template <class T>
    __device__ int operator()(T element) const {
        if (!(scale > 0.0f)) return 0;
        const float x = __fdiv_rn(__fsub_rn(to_float(element), zero), scale);
        return __float2int_rn(fminf(fmaxf(x, low), high));
    }
};

// Quantises a head of a token, with one warp.
template <class T>
__device__ void quantize_head(const AppendKvArgs& args, int64_t token, int64_t slot, int head) {
    const int dim = static_cast<int>(args.head_dim);
    const bool four = args.format == KvFormat::int4;
    const T* x = reinterpret_cast<const T*>(args.from + token * args.from_token + head * args.from_head);
    char* codes = slot_of(args.to, slot) + head * args.to.head_stride;
    if (args.format == KvFormat::e4m3) {
        for (int d = lane(); d < dim; d += kWarp) codes[d] = static_cast<char>(to_e4m3(to_float(x[d])));
        return;
    }
    const HeadRange range = range_of(x, dim);
    const float span = four ? __fsub_rn(range.high, range.low) : fmaxf(range.high, -range.low);
    const Affine numbers =
        affine_of(range.finite, from_float<f16>(__fdiv_rn(span, four ? kMostInt4 : kMostInt8)),
                  four ? from_float<f16>(range.low) : f16{0});
    if (lane() == 0) {
        const int64_t index = slot * args.to.heads + head;
        args.scales.scale[index] = numbers.scale;
        if (four) args.scales.zero[index] = numbers.zero;
    }
    const Encode encode{to_float(numbers.scale), to_float(numbers.zero), four ? 0.0f : -kMostInt8,
                        four ? kMostInt4 : kMostInt8};
    if (four) {
        const int half = dim / 2;
        for (int d = lane(); d < half; d += kWarp) {
            codes[d] = static_cast<char>(encode(x[d]) | encode(x[half + d]) << 4);
        }
    } else {
        for (int d = lane(); d < dim; d += kWarp) codes[d] = static_cast<char>(encode(x[d]));
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    append_quantized_kernel(const __grid_constant__ AppendKvArgs k, const __grid_constant__ AppendKvArgs v) {
    const int64_t token = blockIdx.x, slot = at(k.slots, token);
    const int heads = static_cast<int>(k.to.heads);
    for (int i = warp(); i < 2 * heads; i += kThreads / kWarp) {
        i < heads ? quantize_head<T>(k, token, slot, i) : quantize_head<T>(v, token, slot, i - heads);
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
