// sample: one token from each row of logits [V], after temperature, top-k, top-p and min-p.
//
// Weights are integers (fixed_exp.cuh), so every sum is exact, and the draw is that of the CPU to the bit;
// csrc/cpu/sample.cpp defines the options. A row has a block of 512 threads, and each warp has a sixteenth of
// it. If there are fewer rows than SMs, up to eight blocks share a row (Team). They add up their sums through
// memory and wait for each other after each pass, so they all make the same decisions. The first pass brings
// the row into L2, where the others read it:
//
//   1  the maximum;  2  the sums of all weights, tempered and untempered;
//   3  for top-k and for top-p, the cut: each pass halves the range that contains it, until the range has at
//      most 1024 logits; these are listed in shared memory, and the halving continues in the list;
//   4  the kept weights of each piece of the row: the piece with the draw is cut into pieces again, until one
//      warp holds it.
//
// Bytes: V logits from memory, and from L2 six to ten times as many with a cut, three times without. There is
// one launch. If blocks share rows, it is cooperative, and counters are cleared before it.
#include <algorithm>

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
constexpr int64_t kLogitsOfBlock = 16 * kThreads;  // smallest part of a shared row for a block
constexpr int kElsewhere = -2;                     // in place of a token that another block finds

struct Piece {  // sums of kept weights, for a warp or a block
    uint64_t above;
    uint32_t ties;
};

// ---- the blocks that share a row --------------------------------------------------------------------------

// The results of one block; of all blocks.
struct Note {
    uint64_t a = 0, b = 0, c = 0;

    __device__ Note operator+(const Note& other) const { return {a + other.a, b + other.b, c + other.c}; }
};

// The memory that a row's blocks share: counters, which begin at 0, and fields without an initial value.
struct RowCounters {
    uint32_t arrived, listed[2];
};
struct RowBoard {
    Note notes[2][kMostSampleBlocks];
    uint64_t weights[kList];
    int32_t keys[kList];
};

// This block's place among the blocks of its row. The members are the same in all threads and, except for the
// rank, in all blocks. All blocks must call its functions in the same order.
class Team {
  public:
    __device__ Team(RowCounters* counters, RowBoard* board, int rank, int size)
        : counters_(counters), board_(board), rank_(rank), size_(size) {}

    __device__ int rank() const { return rank_; }
    __device__ int size() const { return size_; }
    __device__ RowBoard& board() const { return *board_; }
    // The value that draw returns if all blocks know that there is no token: only one block reports it.
    __device__ int no_token() const { return rank_ == 0 ? -1 : kElsewhere; }

    // Waits for all blocks. After it, all of their earlier writes can be read.
    __device__ void meet() {
        ++meetings_;
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(&counters_->arrived, 1u);
            const uint32_t all = meetings_ * static_cast<uint32_t>(size_);
            while (*static_cast<volatile uint32_t*>(&counters_->arrived) < all) {
            }
            __threadfence();
        }
        __syncthreads();
    }

    // Exchanges the results of the blocks; `mine` must be known to every thread of the block. Returns them in
    // block order. They can be read until the next meeting but one.
    __device__ const Note* share(const Note& mine) {
        Note* notes = board_->notes[meetings_ % 2];
        if (threadIdx.x == 0) notes[rank_] = mine;
        meet();
        return notes;
    }

    __device__ Note sum(const Note& mine) {
        if (size_ == 1) return mine;
        const Note* notes = share(mine);
        Note all;
        for (int i = 0; i < size_; ++i) all = all + notes[i];
        return all;
    }

    // Reserves `count` places in one of the row's two lists; returns the first one.
    __device__ uint32_t reserve(int list, uint32_t count) const {
        return atomicAdd(&counters_->listed[list], count);
    }
    __device__ uint32_t listed(int list) const { return counters_->listed[list]; }

  private:
    RowCounters* counters_;
    RowBoard* board_;
    int rank_, size_;
    uint32_t meetings_ = 0;
};

struct Shared {
    uint64_t weights[kList];
    int32_t keys[kList];
    uint64_t sums[kWarps];
    uint32_t counts[kWarps];
    float floats[kWarps];
    Piece pieces[kWarps];
    uint32_t listed, at;
};

// ---- a row ------------------------------------------------------------------------------------------------

template <class T>
struct Row {
    const T* x;
    int vocab;
    bool vectors;    // the row begins at a multiple of 16 bytes
    int begin, end;  // this block's part; begin is a multiple of kEach
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

    // The same for this block's part, with all threads of the block.
    template <class F>
    __device__ void each(F f) const {
        const int size = piece_size(begin, end), first = min(begin + warp() * size, end);
        each(first, min(first + size, end), f);
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

// A key between low and high > low. First half-way by value, because logits with close values may have
// distant keys; later half-way by key.
__device__ int32_t middle(int32_t low, int32_t high, int step) {
    constexpr int kByValue = 8;
    const int32_t by_key = static_cast<int32_t>((int64_t{low} + high) >> 1);
    if (step >= kByValue) return by_key;
    const int32_t by_value = order_key(0.5f * key_score(low) + 0.5f * key_score(high));
    return min(max(by_value, low), high - 1);
}

// Replaces this block's list by the lists of all blocks.
__device__ void gather(int list, Team& team, Shared& shared) {
    RowBoard& board = team.board();
    if (threadIdx.x == 0) shared.at = team.reserve(list, shared.listed);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < shared.listed; i += kThreads) {
        board.keys[shared.at + i] = shared.keys[i];
        board.weights[shared.at + i] = shared.weights[i];
    }
    team.meet();
    if (threadIdx.x == 0) shared.listed = team.listed(list);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < shared.listed; i += kThreads) {
        shared.keys[i] = board.keys[i];
        shared.weights[i] = board.weights[i];
    }
}

// The largest logit for which it and all above it have a measure that reaches `target`; `above`: the measure
// of those above it. The measure of an element is its weight, or 1. The logit lies in [floor, top], which has
// `count` elements.
template <class T>
__device__ float select(const Row<T>& row, bool by_weight, float top, float floor, uint32_t count,
                        uint64_t target, uint64_t& above, Team& team, Shared& shared) {
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
            if (team.size() > 1) gather(by_weight, team, shared);
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
        if (!listed) {
            const Note all = team.sum({upper.measure, upper.count, 0});
            upper = {all.a, static_cast<uint32_t>(all.b)};
        }
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

// `all`: the sum of all weights; `count`: the number of logits that are not below `floor`, where weights are
// 0.
template <class T>
__device__ Cut find_cut(const Row<T>& row, float top, float floor, uint64_t all, uint32_t count, Team& team,
                        Shared& shared) {
    const FixedExp exp = row.weights();
    Cut cut;
    uint64_t above;
    cut.least = row.options.min_p * static_cast<float>(uint64_t{1} << kWeightBits);
    const uint64_t k = static_cast<uint64_t>(row.options.top_k);
    if (row.has_top_k() && k <= count) {
        cut.logit = select(row, false, top, floor, count, k, above, team, shared);
        if (row.has_top_p()) {  // of the logits that are left after top-k
            uint64_t left = 0;
            row.each([&](int, float x) {
                if (x >= cut.logit) left += exp.weight(x - top);
            });
            all = team.sum({reduce_block<kThreads>(left, shared.sums, Add{}), 0, 0}).a;
        }
    }
    if (row.has_top_p()) {
        const uint64_t target = part_of(row.options.top_p, all);
        cut.logit = select(row, true, top, floor, count, target, above, team, shared);
        const uint64_t weight = exp.weight(cut.logit - top);
        if (weight > 0) cut.ties = static_cast<uint32_t>((target - above + weight - 1) / weight);
    }
    return cut;
}

// ---- the draw ---------------------------------------------------------------------------------------------

// Stores the kept weights of each warp's piece of [begin, end) in `shared.pieces`.
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

// The token at which the running sum of kept weights exceeds a random part of their total; kElsewhere if
// another block finds it.
template <class T>
__device__ int draw_token(const Row<T>& row, const Cut& cut, float top, Team& team, Shared& shared) {
    const FixedExp exp = row.weights();
    const float tie = exp(cut.logit - top);
    const uint64_t tie_weight = tie >= cut.least ? __float2ull_rn(tie) : 0;
    uint32_t ties_left = cut.ties;
    const auto kept = [&](const Piece& p) { return p.above + tie_weight * min(p.ties, ties_left); };

    int begin = row.begin, end = row.end;
    weigh_pieces(row, cut, top, begin, end, shared);
    Note mine;
    for (const Piece& p : shared.pieces) mine = mine + Note{p.above, p.ties, 0};
    const Note* const notes = team.size() > 1 ? team.share(mine) : &mine;
    const auto piece_of = [&](int block) {
        return Piece{notes[block].a, static_cast<uint32_t>(notes[block].b)};
    };
    uint64_t total = 0;
    for (int b = 0; b < team.size(); ++b) {
        total += kept(piece_of(b));
        ties_left -= min(piece_of(b).ties, ties_left);
    }
    uint64_t target = draw_below(row.options, total);
    ties_left = cut.ties;
    for (int b = 0; b < team.rank(); ++b) {
        const uint64_t weight = kept(piece_of(b));
        if (target < weight) return kElsewhere;
        target -= weight;
        ties_left -= min(piece_of(b).ties, ties_left);
    }
    if (team.rank() < team.size() - 1 && target >= kept(piece_of(team.rank()))) return kElsewhere;
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

// The index of the n-th logit that equals `value`, -1 if it is not found although it should be; kElsewhere if
// it is in another block's part.
template <class T>
__device__ int nth_equal(const Row<T>& row, float value, uint64_t n, Team& team, Shared& shared) {
    if (team.size() > 1) {
        uint32_t equal = 0;
        row.each([&](int, float x) { equal += x == value; });
        const Note* const notes = team.share({reduce_block<kThreads>(equal, shared.counts, Add{}), 0, 0});
        for (int b = 0; b < team.rank(); ++b) {
            if (n < notes[b].a) return kElsewhere;
            n -= notes[b].a;
        }
        if (team.rank() < team.size() - 1 && n >= notes[team.rank()].a) return kElsewhere;
    }
    int begin = row.begin, end = row.end;
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

// A row with +inf: each such logit has weight 1 and all others 0; -1 without a finite logit beside them.
template <class T>
__device__ int draw_infinite(const Row<T>& row, float& logprob, Team& team, Shared& shared) {
    uint32_t infinite = 0;
    bool finite = false;
    row.each([&](int, float x) {
        infinite += x == INFINITY;
        finite |= x - x == 0.0f;
    });
    infinite = reduce_block<kThreads>(infinite, shared.counts, Add{});
    const Note all = team.sum({infinite, __syncthreads_or(finite) != 0, 0});
    if (all.b == 0) return team.no_token();
    logprob = static_cast<float>(-log(static_cast<double>(all.a)));
    const uint64_t part = part_of(row.options.top_p, all.a);
    return nth_equal(row, INFINITY, row.greedy() ? 0 : draw_below(row.options, part), team, shared);
}

struct Scan {
    float top;
    bool nan;
};

template <class T>
__device__ Scan find_top(const Row<T>& row, Team& team, Shared& shared) {
    float top = -INFINITY;
    bool nan = false;
    row.each([&](int, float x) {
        top = fmaxf(top, x);
        nan |= x != x;
    });
    top = reduce_block<kThreads>(top, shared.floats, Max{});
    nan = __syncthreads_or(nan) != 0;
    if (team.size() == 1) return {top, nan};
    const Note* const notes = team.share({__float_as_uint(top), nan, 0});
    for (int b = 0; b < team.size(); ++b) {
        top = fmaxf(top, __uint_as_float(static_cast<uint32_t>(notes[b].a)));
        nan |= notes[b].b != 0;
    }
    return {top, nan};
}

// A row's token, -1 if there is none, and its log-probability. If the token is found by one block, all other
// blocks return kElsewhere.
template <class T>
__device__ int draw(const Row<T>& row, float& logprob, Team& team, Shared& shared) {
    logprob = NAN;
    const Scan scan = find_top(row, team, shared);
    const float top = scan.top;
    if (scan.nan || top == -INFINITY) return team.no_token();
    if (top == INFINITY) return draw_infinite(row, logprob, team, shared);

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
    const Note of_row = team.sum({all, count, untempered});
    all = of_row.a, count = static_cast<uint32_t>(of_row.b), untempered = of_row.c;

    int token;
    if (row.greedy()) {
        token = nth_equal(row, top, 0, team, shared);
    } else {
        token = draw_token(row, find_cut(row, top, floor, all, count, team, shared), top, team, shared);
    }
    if (token < 0) return token;
    const double sum = static_cast<double>(untempered) * 0x1p-39;
    logprob =
        static_cast<float>(static_cast<double>(to_float(row.x[token])) - static_cast<double>(top) - log(sum));
    return token;
}

template <class T>
__global__ __launch_bounds__(kThreads, 1) void sample_kernel(SampleArgs args, int blocks,
                                                             RowCounters* counters, RowBoard* boards) {
    __shared__ Shared shared;
    const int64_t r = blockIdx.x / blocks;
    Team team(counters + r, boards + r, static_cast<int>(blockIdx.x % blocks), blocks);
    const T* x = static_cast<const T*>(args.logits.data) + r * args.stride;
    const int vocab = static_cast<int>(args.vocab),
              part = static_cast<int>(round_up(divide_up(vocab, blocks), kEach)),
              begin = min(team.rank() * part, vocab);
    const Row<T> row{.x = x,
                     .vocab = vocab,
                     .vectors = reinterpret_cast<uintptr_t>(x) % 16 == 0,
                     .begin = begin,
                     .end = min(begin + part, vocab),
                     .options = options_of(args, r)};
    float logprob;
    const int token = draw(row, logprob, team, shared);
    if (threadIdx.x != 0 || token == kElsewhere) return;
    args.tokens[r] = token;
    args.logprobs[r] = logprob;
}

}  // namespace

SampleGrid sample_grid(const SampleArgs& args) {
    const int64_t fill = device_attribute(cudaDevAttrMultiProcessorCount) / std::max<int64_t>(args.rows, 1),
                  pay = args.vocab / kLogitsOfBlock;
    const int64_t blocks = std::clamp<int64_t>(std::min(fill, pay), 1, kMostSampleBlocks);
    constexpr int64_t kBytes = sizeof(RowBoard) + sizeof(RowCounters);
    return {blocks, blocks > 1 ? divide_up(args.rows * kBytes, int64_t{sizeof(uint64_t)}) : 0};
}

void sample(const SampleArgs& args, const SampleGrid& grid, void* workspace, cudaStream_t stream) {
    auto* const boards = static_cast<RowBoard*>(workspace);
    auto* const counters = reinterpret_cast<RowCounters*>(boards + args.rows);
    const int blocks = static_cast<int>(grid.blocks);
    dispatch(args.logits.dtype, [&]<class T>(T*) {
        if (blocks == 1) {
            launch(sample_kernel<T>, args.rows, kThreads, 0, stream, args, 1, counters, boards);
        } else {
            check(cudaMemsetAsync(counters, 0, static_cast<size_t>(args.rows) * sizeof(RowCounters), stream));
            launch_together(sample_kernel<T>, args.rows * blocks, kThreads, stream, args, blocks, counters,
                            boards);
        }
        if (args.top) launch(likeliest_kernel<T>, args.rows, kLikeliestThreads, 0, stream, args);
    });
}

}  // namespace tts::cuda
