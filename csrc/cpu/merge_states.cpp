// merge_states: merges two attention results over disjoint keys into one over all keys.
//
//   out = (w_a out_a + w_b out_b) / (w_a + w_b),   w = exp(lse - max(lse_a, lse_b))
//   lse = logaddexp(lse_a, lse_b)
//
// Each input is a softmax state (online_softmax.h) with sum 1 and max lse. It is taken relative to the larger
// lse before it is converted to units of log2, so that large log-sum-exps lose no precision. Reads each row
// once.
#include "merge_states.h"

#include "online_softmax.h"

TTS_BEGIN_ISA

namespace {

// The two states of one row and head.
template <class T>
void merge_pair(const MergeStatesArgs& args, int64_t row) {
    constexpr int W = Vec::width;
    const int64_t n = args.head_dim;
    const T *a = static_cast<const T*>(args.out_a) + row * n,
            *b = static_cast<const T*>(args.out_b) + row * n;
    T* out = static_cast<T*>(args.out) + row * n;
    const float lse_a = args.lse_a[row], lse_b = args.lse_b[row];
    if (lse_a == -kInfinity || lse_b == -kInfinity) {  // one is empty: the other, bit for bit
        args.lse[row] = lse_a == -kInfinity ? lse_b : lse_a;
        __builtin_memcpy(out, lse_a == -kInfinity ? b : a, sizeof(T) * static_cast<uint64_t>(n));
        return;
    }
    const float top = lse_a > lse_b ? lse_a : lse_b;
    const auto relative = [top](float lse) {
        return SoftmaxState{lse == top ? 0.0f : (lse - top) * kLog2E, 1.0f};
    };
    const MergeWeights w = merge(relative(lse_a), relative(lse_b));
    args.lse[row] = top + w.state.lse();
    const Vec wa = Vec::all(w.a / w.state.sum), wb = Vec::all(w.b / w.state.sum);
    for (int64_t d = 0; d < n; d += W) {
        const int left = n - d < W ? static_cast<int>(n - d) : W;
        const Vec x = fma(Vec::load(a + d, left), wa, Vec::load(b + d, left) * wb);
        x.store(out + d, left);
    }
}

}  // namespace

void merge_states(const MergeStatesArgs& args, int64_t begin, int64_t end) {
    dispatch(args.dtype, [&]<class T>(T*) {
        for (int64_t row = begin; row < end; ++row) merge_pair<T>(args, row);
    });
}

TTS_END_ISA
