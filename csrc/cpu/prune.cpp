// prune: the k best candidates of each group, best first.
//
//   scores [S], group g owns scores[indptr[g] : indptr[g + 1]]  ->  indices [G, K] padded with -1, counts [G]
//
// Scores become integer keys (total_order.h). Groups of a beam search are small (4 to 4096 candidates) and k
// smaller still, so two ways lead to the k best:
//
//   few (K <= 16): four vectors keep the largest key of each of their lanes; taking their maximum k times
//   gives the k-th of these, a bound that at least k candidates reach. A group that fits in the four vectors
//   is done with that; of a longer one, a second pass takes the candidates that reach the bound, of which
//   there are few more than k.
//
//   many: radix select finds the k-th largest key in four passes of a byte each, one pass collects the
//   candidates above it and the first of its equals, and heap sort orders them.
#include "prune.h"

#include "total_order.h"
#include "vec.h"

TTS_BEGIN_ISA

namespace {

constexpr int kFew = static_cast<int>(kFewSurvivors);
constexpr int kVectors = 4;
constexpr int kLanes = kVectors * Keys::width;
static_assert(kFew <= kLanes);  // the bound needs k lanes

// ---- few
// -----------------------------------------------------------------------------------------------------

// Four vectors of keys, and the lanes' numbers.
struct Lanes {
    Keys keys[kVectors];

    // The largest key of each lane over n scores.
    template <class T>
    static Lanes of(const T* scores, int64_t n) {
        Lanes lanes;
        for (int j = 0; j < kVectors; ++j) {
            const int64_t rest = n - j * Keys::width;
            lanes.keys[j] = rest > 0 ? load_keys(scores + j * Keys::width, rest) : Keys::all(kNoKey);
        }
        for (int64_t i = kLanes; i < n; i += kLanes) {
            for (int j = 0; j < kVectors; ++j) {
                const int64_t at = i + j * Keys::width;
                if (at < n) lanes.keys[j] = Keys::max(lanes.keys[j], load_keys(scores + at, n - at));
            }
        }
        return lanes;
    }

    // Takes the largest key out, from the lowest lane that holds it.
    int32_t take(int& lane) {
        const Keys top = Keys::max(Keys::max(keys[0], keys[1]), Keys::max(keys[2], keys[3]));
        const int32_t best = top.max();
        uint64_t holders = 0;
        for (int j = kVectors - 1; j >= 0; --j)
            holders = holders << Keys::width | keys[j].equal(Keys::all(best));
        const uint64_t first = holders & (~holders + 1);
        for (int j = 0; j < kVectors; ++j) {
            const uint64_t mine = first >> (j * Keys::width) & ((uint64_t{1} << Keys::width) - 1);
            keys[j] = keys[j].replace(static_cast<uint32_t>(mine), kNoKey);
        }
        lane = __builtin_ctzll(holders);
        return best;
    }
};

// At most k ranks, best first.
class Best {
  public:
    explicit Best(int k) : k_(k) {}

    void add(uint64_t rank) {
        if (size_ == k_ && rank < ranks_[k_ - 1]) return;
        int i = size_ < k_ ? size_++ : k_ - 1;
        for (; i > 0 && ranks_[i - 1] < rank; --i) ranks_[i] = ranks_[i - 1];
        ranks_[i] = rank;
    }
    bool full() const { return size_ == k_; }
    uint64_t worst() const { return ranks_[size_ - 1]; }
    const uint64_t* data() const { return ranks_; }

  private:
    int k_, size_ = 0;
    uint64_t ranks_[kFew];
};

// The k <= min(n, kFew) best of n scores into `ranks`, best first.
template <class T>
void select_few(const T* scores, int64_t n, int k, uint64_t* ranks) {
    Lanes lanes = Lanes::of(scores, n);
    int32_t bound = kNoKey;
    for (int i = 0; i < k; ++i) {
        int lane;
        bound = lanes.take(lane);
        ranks[i] = ranked(bound, static_cast<uint32_t>(lane));
    }
    if (n <= kLanes) return;
    Best best(k);
    Keys above = Keys::all(bound - 1);
    for (int64_t i = 0; i < n; i += Keys::width) {
        const Keys keys = load_keys(scores + i, n - i);
        uint32_t hits = keys.greater(above);
        if (!hits) continue;
        int32_t lane_keys[Keys::width];
        keys.store(lane_keys);
        for (; hits; hits &= hits - 1) {
            const int lane = __builtin_ctz(hits);
            best.add(ranked(lane_keys[lane], static_cast<uint32_t>(i + lane)));
        }
        if (best.full()) above = Keys::all(ranked_key(best.worst()));  // equals that come later lose
    }
    __builtin_memcpy(ranks, best.data(), static_cast<unsigned>(k) * sizeof *ranks);
}

// ---- many
// ----------------------------------------------------------------------------------------------------

// The k-th largest of n keys, and how many of its equals are among the k.
struct Threshold {
    int32_t key;
    int64_t equals;
};

Threshold kth_largest(const int32_t* keys, int64_t n, int64_t k) {
    uint32_t prefix = 0, known = 0;  // the bits of the answer so far
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t counts[256] = {};
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t u = static_cast<uint32_t>(keys[i]) ^ 0x80000000u;
            if ((u & known) == prefix) ++counts[u >> shift & 0xffu];
        }
        int byte = 255;
        for (; counts[byte] < k; --byte) k -= counts[byte];
        prefix |= static_cast<uint32_t>(byte) << shift;
        known |= 0xffu << shift;
    }
    return {static_cast<int32_t>(prefix ^ 0x80000000u), k};
}

void sift_down(uint64_t* heap, int64_t root, int64_t n) {
    const uint64_t value = heap[root];
    for (int64_t child; (child = 2 * root + 1) < n; root = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) ++child;
        if (value <= heap[child]) break;
        heap[root] = heap[child];
    }
    heap[root] = value;
}

// Greatest first: a heap with the least on top gives it to the end.
void sort_ranks(uint64_t* ranks, int64_t n) {
    for (int64_t i = n / 2; i-- > 0;) sift_down(ranks, i, n);
    for (int64_t i = n; i-- > 1;) {
        const uint64_t least = ranks[0];
        ranks[0] = ranks[i];
        ranks[i] = least;
        sift_down(ranks, 0, i);
    }
}

// The k <= n best of n scores into `ranks`, in candidate order.
template <class T>
void select_many(const T* scores, int64_t n, int64_t k, int32_t* keys, uint64_t* ranks) {
    for (int64_t i = 0; i < n; i += Keys::width) {
        const Keys some = load_keys(scores + i, n - i);
        if (n - i >= Keys::width) {
            some.store(keys + i);
        } else {
            int32_t lanes[Keys::width];
            some.store(lanes);
            __builtin_memcpy(keys + i, lanes, static_cast<uint64_t>(n - i) * sizeof *keys);
        }
    }
    Threshold threshold = kth_largest(keys, n, k);
    for (int64_t i = 0; i < n; ++i) {
        if (keys[i] < threshold.key || (keys[i] == threshold.key && threshold.equals-- <= 0)) continue;
        *ranks++ = ranked(keys[i], static_cast<uint32_t>(i));
    }
}

// ---- one group
// -----------------------------------------------------------------------------------------------

void sort_by_index(uint64_t* ranks, int64_t n) {
    for (int64_t i = 1; i < n; ++i) {
        const uint64_t rank = ranks[i];
        int64_t j = i;
        for (; j > 0 && ranked_index(ranks[j - 1]) > ranked_index(rank); --j) ranks[j] = ranks[j - 1];
        ranks[j] = rank;
    }
}

// Indices [K] double as the place for ranks: both have 64 bits.
template <class T>
void prune_group(const T* scores, int64_t begin, int64_t n, int64_t k, const PruneArgs& args,
                 int64_t* indices) {
    auto* ranks = reinterpret_cast<uint64_t*>(indices);
    if (args.width <= kFew) {
        select_few(scores + begin, n, static_cast<int>(k), ranks);
        if (args.keep_order) sort_by_index(ranks, k);
    } else {
        select_many(scores + begin, n, k, args.keys + begin, ranks);
        if (!args.keep_order) sort_ranks(ranks, k);
    }
    for (int64_t i = 0; i < k; ++i) indices[i] = begin + ranked_index(ranks[i]);
    for (int64_t i = k; i < args.width; ++i) indices[i] = -1;
}

}  // namespace

void prune(const PruneArgs& args, int64_t begin, int64_t end) {
    visit(args.scores, [&](const auto* scores) {
        for (int64_t g = begin; g < end; ++g) {
            const int64_t first = at(args.indptr, g), n = at(args.indptr, g + 1) - first;
            const int64_t wanted = args.k.data ? at(args.k, g) : args.width, k = wanted < n ? wanted : n;
            args.counts[g] = static_cast<int32_t>(k);
            prune_group(scores, first, n, k, args, args.indices + g * args.width);
        }
    });
}

TTS_END_ISA
