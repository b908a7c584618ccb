// sample: one token from each row of logits [V], after temperature, top-k, top-p and min-p.
//
// Weights are integers (fixed_exp.cuh), so every sum is exact and the draw is the CPU's to the bit; what the
// options mean is told in csrc/cpu/sample.cpp. A block of 512 threads for each row, a warp for each sixteenth
// of it; the first pass brings the row into L2, where the others find it:
//
//   1  the maximum;  2  all weights, tempered and not;
//   3  for top-k and for top-p, the cut: the range that it lies in is halved, a pass each time, until up to
//   1024
//      logits are left in it; these are listed in shared memory and the range is halved there;
//   4  the weights that are kept, a piece of the row at a time: the piece that the draw falls into is cut
//   into
//      pieces again, until a warp holds it.
//
// Bytes: V logits from memory, six to ten times as many from L2 with a cut, three without. One launch.
#include "block_size.cuh"
#include "fixed_exp.cuh"
#include "launch.cuh"
#include "likeliest.cuh"
#include "philox.h"
#include "reduce.cuh"
#include "sample.h"
#include "sample_options.h"
#include "total_order.h"
#include "vector.cuh"

namespace tts::cuda {
namespace {

constexpr int kThreads = block_size(512), kWarps = kThreads / kWarp, kList = 2 * kThreads, kEach = 8;
constexpr float kLargest = 3.40282347e38f;

struct Piece {  // of the kept weights, by warp
    uint64_t above;
    uint32_t ties;
};

struct Shared {
    uint64_t weights[kList];
    int32_t keys[kList];
    uint64_t sums[kWarps];
    uint32_t counts[kWarps];
    float floats[kWarps];
    Piece pieces[kWarps];
    uint32_t listed;
};

// ---- a row ------------------------------------------------------------------------------------------------

template <class T>
struct Row {
    const T* x;
    int vocab;
    bool vectors;  // the row begins at a multiple of 16 bytes
    SampleOptions options;

    __device__ bool greedy() const { return options.temperature == 0.0f; }
    __device__ bool has_top_k() const { return options.top_k > 0 && options.top_k < vocab; }
    __device__ bool has_top_p() const { return options.top_p < 1.0f; }
    __device__ FixedExp weights() const { return FixedExp(greedy() ? 1.0f : options.temperature); }

    // f(i, x[i]) for i in [begin, end), by one warp; begin is a multiple of kEach.
    template <class F>
    __device__ void each(int begin, int end, F f) const {
#pragma unroll 2
        for (int i = begin + lane() * kEach; i < end; i += kWarp * kEach) {
            if (vectors && i + kEach <= end) {
                float v[kEach];
                load(x + i, v);
#pragma unroll
                for (int j = 0; j < kEach; ++j) f(i + j, v[j]);
            } else {
                for (int j = i; j < min(i + kEach, end); ++j) f(j, to_float(x[j]));
            }
        }
    }

    // The same for the whole row, by the block.
    template <class F>
    __device__ void each(F f) const {
        const int size = piece_size(0, vocab);
        each(min(warp() * size, vocab), min((warp() + 1) * size, vocab), f);
    }

    // A warp's part of [begin, end), a multiple of kEach.
    __device__ static int piece_size(int begin, int end) {
        return (end - begin + kWarps * kEach - 1) / (kWarps * kEach) * kEach;
    }
};

// floor(r total / 2**64)
__device__ uint64_t draw_below(const SampleOptions& options, uint64_t total) {
    return __umul64hi(philox_draw(options.seed, options.offset), total);
}

// ceil(fraction total), the fraction rounded up to a multiple of 2**-32.
__device__ uint64_t part_of(float fraction, uint64_t total) {
    const uint64_t parts = static_cast<uint64_t>(ceil(static_cast<double>(fraction) * 0x1p32));
    const uint64_t low = parts * total, sum = low + 0xffffffffu;
    return (__umul64hi(parts, total) + (sum < low)) << 32 | sum >> 32;
}

// ---- the cut ----------------------------------------------------------------------------------------------

// Kept are the logits above `logit` and the first `ties` of those equal to it, if their weight reaches
// `least`.
struct Cut {
    float logit = -INFINITY;
    uint32_t ties = UINT32_MAX;
    float least = 0.0f;
};

struct Sums {
    uint64_t measure;
    uint32_t count;
};

// A key between low and high > low: half-way by value, for what lies close in key may lie far apart, then by
// key.
__device__ int32_t middle(int32_t low, int32_t high, int step) {
    constexpr int kByValue = 8;
    const int32_t by_key = static_cast<int32_t>((int64_t{low} + high) >> 1);
    if (step >= kByValue) return by_key;
    const int32_t by_value = order_key(0.5f * key_score(low) + 0.5f * key_score(high));
    return min(max(by_value, low), high - 1);
}

// The largest logit whose measure, with that of all above it, reaches `target`; `above`: the measure of those
// above it alone. An element measures its weight, or 1. It lies in [floor, top], where `count` elements are.
template <class T>
__device__ float select(const Row<T>& row, bool by_weight, float top, float floor, uint32_t count,
                        uint64_t target, uint64_t& above, Shared& shared) {
    const FixedExp exp = row.weights();
    const auto measure = [&](float x) { return by_weight ? exp.weight(x - top) : uint64_t{1}; };
    int32_t low = order_key(floor), high = order_key(top);
    bool listed = false;
    above = 0;
    for (int step = 0; low < high; ++step) {
        if (!listed && count <= kList) {
            if (threadIdx.x == 0) shared.listed = 0;
            __syncthreads();
            row.each([&](int, float x) {
                const int32_t key = order_key(x);
                if (key < low || key > high) return;
                const uint32_t at = atomicAdd(&shared.listed, 1u);
                shared.keys[at] = key;
                shared.weights[at] = measure(x);
            });
            __syncthreads();
            count = shared.listed;
            listed = true;
        }
        const int32_t mid = middle(low, high, step);
        Sums upper{0, 0};  // of those in (mid, high]
        if (listed) {
            for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
                if (shared.keys[i] > mid && shared.keys[i] <= high) upper.measure += shared.weights[i];
            }
        } else {
            row.each([&](int, float x) {
                const int32_t key = order_key(x);
                if (key <= mid || key > high) return;
                upper.measure += measure(x);
                ++upper.count;
            });
            upper.count = reduce_block<kThreads>(upper.count, shared.counts, Add{});
        }
        upper.measure = reduce_block<kThreads>(upper.measure, shared.sums, Add{});
        if (above + upper.measure >= target) {
            low = mid + 1;
            if (!listed) count = upper.count;
        } else {
            high = mid;
            above += upper.measure;
            if (!listed) count -= upper.count;
        }
    }
    return key_score(low);
}

// `all`: the sum of all weights; `count`: of the logits that are not below `floor`, where weights are 0.
template <class T>
__device__ Cut find_cut(const Row<T>& row, float top, float floor, uint64_t all, uint32_t count,
                        Shared& shared) {
    const FixedExp exp = row.weights();
    Cut cut;
    uint64_t above;
    cut.least = row.options.min_p * static_cast<float>(uint64_t{1} << kWeightBits);
    const uint64_t k = static_cast<uint64_t>(row.options.top_k);
    if (row.has_top_k() && k <= count) {
        cut.logit = select(row, false, top, floor, count, k, above, shared);
        if (row.has_top_p()) {  // of what top-k leaves
            uint64_t left = 0;
            row.each([&](int, float x) {
                if (x >= cut.logit) left += exp.weight(x - top);
            });
            all = reduce_block<kThreads>(left, shared.sums, Add{});
        }
    }
    if (row.has_top_p()) {
        const uint64_t target = part_of(row.options.top_p, all);
        cut.logit = select(row, true, top, floor, count, target, above, shared);
        const uint64_t weight = exp.weight(cut.logit - top);
        if (weight > 0) cut.ties = static_cast<uint32_t>((target - above + weight - 1) / weight);
    }
    return cut;
}

// ---- the draw ---------------------------------------------------------------------------------------------

// The kept weights of each warp's piece of [begin, end) go to `shared.pieces`.
template <class T>
__device__ void weigh_pieces(const Row<T>& row, const Cut& cut, float top, int begin, int end,
                             Shared& shared) {
    const FixedExp exp = row.weights();
    const int size = Row<T>::piece_size(begin, end), first = min(begin + warp() * size, end);
    uint64_t above = 0;
    uint32_t ties = 0;
    row.each(first, min(first + size, end), [&](int, float x) {
        if (x < cut.logit) return;
        const float w = exp(x - top);
        if (x == cut.logit) ++ties;
        if (x > cut.logit && w >= cut.least) above += __float2ull_rn(w);
    });
    above = reduce_lanes(above, Add{});
    ties = reduce_lanes(ties, Add{});
    __syncthreads();  // the last pieces have been read
    if (lane() == 0) shared.pieces[warp()] = {above, ties};
    __syncthreads();
}

// The token at which the running sum of kept weights exceeds a random part of it.
template <class T>
__device__ int draw_token(const Row<T>& row, const Cut& cut, float top, Shared& shared) {
    const FixedExp exp = row.weights();
    const float tie = exp(cut.logit - top);
    const uint64_t tie_weight = tie >= cut.least ? __float2ull_rn(tie) : 0;
    uint32_t ties_left = cut.ties;
    const auto kept = [&](const Piece& p) { return p.above + tie_weight * min(p.ties, ties_left); };

    int begin = 0, end = row.vocab;
    weigh_pieces(row, cut, top, begin, end, shared);
    uint64_t total = 0;
    for (int w = 0; w < kWarps; ++w) {
        total += kept(shared.pieces[w]);
        ties_left -= min(shared.pieces[w].ties, ties_left);
    }
    uint64_t target = draw_below(row.options, total);
    ties_left = cut.ties;
    for (;;) {
        const int size = Row<T>::piece_size(begin, end);
        int w = 0;
        for (; w < kWarps - 1; ++w) {
            const uint64_t weight = kept(shared.pieces[w]);
            if (target < weight) break;
            target -= weight;
            ties_left -= min(shared.pieces[w].ties, ties_left);
        }
        begin = min(begin + w * size, end);
        end = min(begin + size, end);
        if (size <= kEach) break;  // 0: options that nobody has checked left nothing to draw
        weigh_pieces(row, cut, top, begin, end, shared);
    }
    for (int i = begin; i < end; ++i) {
        const float x = to_float(row.x[i]), w = exp(x - top);
        if (x < cut.logit || w < cut.least || (x == cut.logit && ties_left == 0)) continue;
        if (x == cut.logit) --ties_left;
        const uint64_t weight = __float2ull_rn(w);
        if (target < weight) return i;
        target -= weight;
    }
    return -1;
}

// The index of the n-th logit that equals `value`, -1 if there is none where it should be.
template <class T>
__device__ int nth_equal(const Row<T>& row, float value, uint64_t n, Shared& shared) {
    int begin = 0, end = row.vocab;
    for (;;) {
        const int size = Row<T>::piece_size(begin, end), first = min(begin + warp() * size, end);
        uint32_t equal = 0;
        row.each(first, min(first + size, end), [&](int, float x) { equal += x == value; });
        equal = reduce_lanes(equal, Add{});
        __syncthreads();
        if (lane() == 0) shared.counts[warp()] = equal;
        __syncthreads();
        int w = 0;
        for (; w < kWarps - 1 && n >= shared.counts[w]; ++w) n -= shared.counts[w];
        begin = min(begin + w * size, end);
        end = min(begin + size, end);
        if (size <= kEach) break;
    }
    int i = begin;
    while (i < end - 1 && (to_float(row.x[i]) != value || n-- != 0)) ++i;
    return i < end ? i : -1;
}

// A row with +inf: each such logit weighs 1 and all others nothing; -1 without a finite logit beside them.
template <class T>
__device__ int draw_infinite(const Row<T>& row, float& logprob, Shared& shared) {
    uint32_t infinite = 0;
    bool finite = false;
    row.each([&](int, float x) {
        infinite += x == INFINITY;
        finite |= x - x == 0.0f;
    });
    infinite = reduce_block<kThreads>(infinite, shared.counts, Add{});
    if (!__syncthreads_or(finite)) return -1;
    logprob = static_cast<float>(-log(static_cast<double>(infinite)));
    const uint64_t part = part_of(row.options.top_p, infinite);
    return nth_equal(row, INFINITY, row.greedy() ? 0 : draw_below(row.options, part), shared);
}

struct Scan {
    float top;
    bool nan;
};

template <class T>
__device__ Scan find_top(const Row<T>& row, Shared& shared) {
    float top = -INFINITY;
    bool nan = false;
    row.each([&](int, float x) {
        top = fmaxf(top, x);
        nan |= x != x;
    });
    top = reduce_block<kThreads>(top, shared.floats, Max{});
    return {top, __syncthreads_or(nan) != 0};
}

// A row's token, -1 if there is none, and its log-probability.
template <class T>
__device__ int draw(const Row<T>& row, float& logprob, Shared& shared) {
    logprob = NAN;
    const Scan scan = find_top(row, shared);
    const float top = scan.top;
    if (scan.nan || top == -INFINITY) return -1;
    if (top == INFINITY) return draw_infinite(row, logprob, shared);

    const FixedExp exp = row.weights(), plain(1.0f);
    const bool tempered = row.options.temperature != 1.0f;
    const float floor = fmaxf(top + exp.lowest, -kLargest);
    uint64_t all = 0, untempered = 0;
    uint32_t count = 0;
    row.each([&](int, float x) {
        all += exp.weight(x - top);
        if (tempered) untempered += plain.weight(x - top);
        count += x >= floor;
    });
    all = reduce_block<kThreads>(all, shared.sums, Add{});
    count = reduce_block<kThreads>(count, shared.counts, Add{});
    untempered = tempered ? reduce_block<kThreads>(untempered, shared.sums, Add{}) : all;

    int token;
    if (row.greedy()) {
        token = nth_equal(row, top, 0, shared);
    } else {
        token = draw_token(row, find_cut(row, top, floor, all, count, shared), top, shared);
    }
    if (token < 0) return token;
    const double sum = static_cast<double>(untempered) * 0x1p-39;
    logprob =
        static_cast<float>(static_cast<double>(to_float(row.x[token])) - static_cast<double>(top) - log(sum));
    return token;
}

template <class T>
__global__ __launch_bounds__(kThreads) void sample_kernel(SampleArgs args) {
    __shared__ Shared shared;
    const int64_t r = blockIdx.x;
    const T* x = static_cast<const T*>(args.logits.data) + r * args.stride;
    const Row<T> row{x, static_cast<int>(args.vocab), reinterpret_cast<uintptr_t>(x) % 16 == 0,
                     options_of(args, r)};
    float logprob;
    const int token = draw(row, logprob, shared);
    if (threadIdx.x != 0) return;
    args.tokens[r] = token;
    args.logprobs[r] = logprob;
}

}  // namespace

void sample(const SampleArgs& args, cudaStream_t stream) {
    dispatch(args.logits.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        launch(sample_kernel<T>, args.rows, kThreads, 0, stream, args);
        if (args.top) launch(likeliest_kernel<T>, args.rows, kLikeliestThreads, 0, stream, args);
    });
}

}  // namespace tts::cuda
