// merge_states: merges two attention results over disjoint keys into one over all keys.
//
//   out = (w_a out_a + w_b out_b) / (w_a + w_b),   w = exp(lse - max(lse_a, lse_b))
//   lse = logaddexp(lse_a, lse_b)
//
// One launch with a warp for each of the N rows [D]. A row is read once, 16 bytes per lane if it is aligned.
// Log-sum-exps are taken relative to the larger one before they are converted to units of log2, so that large
// ones lose no precision.
#include "block_size.cuh"
#include "launch.cuh"
#include "merge_states.h"
#include "softmax_state.cuh"
#include "vector.cuh"

namespace tts::cuda {
namespace {

constexpr int kWarps = block_size(128) / kWarp;

// w_a a + w_b b. If one state is empty: the other one, bit for bit.
struct Mix {
    enum { kBoth, kFirst, kSecond } which;
    float a, b, lse;

    __device__ Mix(float lse_a, float lse_b) : which(kBoth), a(1.0f), b(1.0f) {
        if (lse_a == -infinity() || lse_b == -infinity()) {
            which = lse_a == -infinity() ? kSecond : kFirst;
            lse = which == kSecond ? lse_b : lse_a;
            return;
        }
        const float top = lse_a > lse_b ? lse_a : lse_b;
        const float x = lse_a == top ? 1.0f : exp2f((lse_a - top) * kLog2E);
        const float y = lse_b == top ? 1.0f : exp2f((lse_b - top) * kLog2E);
        const float sum = x + y, factor = __frcp_rn(sum);
        a = x * factor, b = y * factor, lse = top + log2f(sum) * kLn2;
    }

    template <class T>
    __device__ T operator()(T x, T y) const {
        if (which != kBoth) return which == kFirst ? x : y;
        return from_float<T>(fmaf(to_float(x), a, to_float(y) * b));
    }
};

// The elements of a row, kEach for a lane at a time.
template <class T, int kEach>
struct alignas(kEach * sizeof(T)) Pack {
    T x[kEach];
};

template <class T, int kEach>
__global__ void __launch_bounds__(kWarps* kWarp)
    merge_states_kernel(const __grid_constant__ MergeStatesArgs args, int64_t rows) {
    using Elements = Pack<T, kEach>;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp(),
                  begin = row * args.head_dim / kEach;
    if (row >= rows) return;
    const Mix mix(args.lse_a[row], args.lse_b[row]);
    const auto *a = static_cast<const Elements*>(args.out_a) + begin,
               *b = static_cast<const Elements*>(args.out_b) + begin;
    auto* out = static_cast<Elements*>(args.out) + begin;
    for (int64_t d = lane(); d < args.head_dim / kEach; d += kWarp) {
        const Elements x = a[d], y = b[d];
        Elements mixed;
#pragma unroll
        for (int i = 0; i < kEach; ++i) mixed.x[i] = mix(x.x[i], y.x[i]);
        out[d] = mixed;
    }
    if (lane() == 0) args.lse[row] = mix.lse;
}

}  // namespace

void merge_states(const MergeStatesArgs& args, int64_t rows, cudaStream_t stream) {
    dispatch(args.dtype, [&]<class T>(T*) {
        const int64_t row_bytes = args.head_dim * static_cast<int64_t>(sizeof(T));
        const bool wide = aligned(args.out_a, row_bytes) && aligned(args.out_b) && aligned(args.out);
        const auto kernel = wide ? merge_states_kernel<T, 16 / sizeof(T)> : merge_states_kernel<T, 1>;
        launch(kernel, divide_up(rows, kWarps), kWarps * kWarp, 0, stream, args, rows);
    });
}

}  // namespace tts::cuda
