// prune: the k best candidates of each group, best first.
//
//   scores [S], group g owns scores[indptr[g] : indptr[g + 1]]  ->  indices [G, K] padded with -1, counts [G]
//
// A score and its index are combined into one integer (total_order.h), and the greatest integers are wanted.
// Groups of a beam search are small (4 to 4096 candidates), and k is smaller still. There are two algorithms:
//
//   few (K <= 16): each of sixteen lanes keeps its largest score. At least k candidates reach the k-th
//   largest of these, and rarely many more. A second pass collects the candidates that reach it, and ranks
//   them against each other.
//
//   many: radix select finds the k-th largest key in four passes of a byte each. One pass collects the
//   candidates above it and the first of those equal to it, and heap sort orders them.
#include "prune.h"

#include "total_order.h"
#include "vec.h"

TTS_BEGIN_ISA

namespace {

constexpr int kFew = static_cast<int>(kFewSurvivors);
constexpr int kLanes = 16;      // the largest number of lanes in a vector
static_assert(kFew <= kLanes);  // the bound needs k of them

// ---- few ------------------------------------------------------------------------------------------------

// n scores as a vector; other lanes are -inf.
template <class T>
Vec load_scores(const T* p, int64_t n) {
    if (n >= Vec::width) return Vec::load(p);
    static constexpr float kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Vec scores = Vec::load(p, static_cast<int>(n));
    return select_less(Vec::load(kLane), Vec::all(static_cast<float>(n)), scores, Vec::all(-kInfinity));
}

// The k-th largest of the maxima of sixteen lanes. At least k of the n >= k scores reach it. NaN counts as
// -inf.
template <class T>
float lower_bound(const T* scores, int64_t n, int k) {
    constexpr int W = Vec::width, kVectors = 4, kKept = kLanes / W;
    Vec top[kVectors];
    for (int j = 0; j < kVectors; ++j) {
        const int64_t rest = n - j * W;
        top[j] =
            rest > 0 ? max(load_scores(scores + j * W, rest), Vec::all(-kInfinity)) : Vec::all(-kInfinity);
    }
    int64_t i = kVectors * W;
    for (; i + kVectors * W <= n; i += kVectors * W) {
        for (int j = 0; j < kVectors; ++j) top[j] = max(Vec::load(scores + i + j * W), top[j]);
    }
    for (; i < n; i += W) top[0] = max(load_scores(scores + i, n - i), top[0]);
    for (int j = kKept; j < kVectors; ++j) top[j % kKept] = max(top[j], top[j % kKept]);

    float lanes[kLanes];
    for (int j = 0; j < kKept; ++j) top[j].store(lanes + j * W);
    Vec larger[kKept];  // for each lane, how many lanes are larger
    for (Vec& count : larger) count = Vec::zero();
    for (float lane : lanes) {
        for (int j = 0; j < kKept; ++j) {
            larger[j] = larger[j] + select_less(top[j], Vec::all(lane), Vec::all(1.0f), Vec::zero());
        }
    }
    Vec least = Vec::all(kInfinity);  // the smallest lane that fewer than k lanes beat
    for (int j = 0; j < kKept; ++j) {
        least = min(select_less(larger[j], Vec::all(static_cast<float>(k)), top[j], least), least);
    }
    return -reduce_max(Vec::zero() - least);
}

// Candidates that may be among the k best, in candidate order.
class Hits {
  public:
    static constexpr int kBlock = 64;

    void add(int64_t rank) { ranks_[size_++] = rank; }
    bool full() const { return size_ + kBlock > kCapacity; }

    // Writes the k best, best first. There are rarely many more, so all pairs are compared, without a branch.
    void best(int k, int64_t* out) const {
        int place[kCapacity];
        for (int i = 0; i < size_; ++i) {
            int better = 0;
            for (int j = 0; j < i; ++j) {
                const int wins = ranks_[j] > ranks_[i];
                better += wins;
                place[j] += 1 - wins;
            }
            place[i] = better;
        }
        for (int i = 0; i < size_; ++i) {
            if (place[i] < k) out[place[i]] = ranks_[i];
        }
    }

    // Removes all but the k best. Returns the smallest key with which a later score would be among them.
    int32_t cut(int k) {
        int64_t kept[kFew];
        best(k, kept);
        for (size_ = 0; size_ < k; ++size_) ranks_[size_] = kept[size_];
        return ranked_key(kept[k - 1]) + 1;  // a later candidate with an equal key loses
    }

  private:
    static constexpr int kCapacity = 2 * kBlock;
    int size_ = 0;
    int64_t ranks_[kCapacity];
};

// Writes the k <= min(n, kFew) best of n scores to `ranks`, best first.
template <class T>
void select_few(const T* scores, int64_t n, int k, int64_t* ranks) {
    constexpr int W = Vec::width;
    Hits hits;
    float bound = lower_bound(scores, n, k);
    for (int64_t i = 0; i < n; i += Hits::kBlock) {
        const int64_t count = n - i < Hits::kBlock ? n - i : Hits::kBlock;
        uint64_t mask = 0;
        if (bound > -kInfinity) {
            for (int64_t j = 0; j < count; j += W) {
                mask |= uint64_t{at_least(load_scores(scores + i + j, count - j), Vec::all(bound))} << j;
            }
        } else {  // NaN may be among the k best
            mask = ~uint64_t{0} >> (Hits::kBlock - count);
        }
        for (; mask; mask &= mask - 1) {
            const int j = __builtin_ctzll(mask);
            hits.add(ranked(order_key(to_float(scores[i + j])), static_cast<uint32_t>(i + j)));
        }
        if (hits.full()) bound = key_score(hits.cut(k));
    }
    hits.best(k, ranks);
}

// ---- many -------------------------------------------------------------------------------------------------

// The k-th largest of n keys, and how many of the keys equal to it are among the k.
struct Threshold {
    int32_t key;
    int64_t equals;
};

Threshold kth_largest(const int32_t* keys, int64_t n, int64_t k) {
    uint32_t prefix = 0, known = 0;  // the known leading bits of the answer
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

void sift_down(int64_t* heap, int64_t root, int64_t n) {
    const int64_t value = heap[root];
    for (int64_t child; (child = 2 * root + 1) < n; root = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) ++child;
        if (value <= heap[child]) break;
        heap[root] = heap[child];
    }
    heap[root] = value;
}

// Sorts in descending order: a heap with the smallest on top moves it to the end.
void sort_ranks(int64_t* ranks, int64_t n) {
    for (int64_t i = n / 2; i-- > 0;) sift_down(ranks, i, n);
    for (int64_t i = n; i-- > 1;) {
        const int64_t least = ranks[0];
        ranks[0] = ranks[i];
        ranks[i] = least;
        sift_down(ranks, 0, i);
    }
}

// Writes the k <= n best of n scores to `ranks`, in candidate order.
template <class T>
void select_many(const T* scores, int64_t n, int64_t k, int32_t* keys, int64_t* ranks) {
    for (int64_t i = 0; i < n; ++i) keys[i] = order_key(to_float(scores[i]));
    Threshold threshold = kth_largest(keys, n, k);
    for (int64_t i = 0; i < n; ++i) {
        if (keys[i] < threshold.key || (keys[i] == threshold.key && threshold.equals-- <= 0)) continue;
        *ranks++ = ranked(keys[i], static_cast<uint32_t>(i));
    }
}

// ---- one group --------------------------------------------------------------------------------------------

void sort_by_index(int64_t* ranks, int64_t n) {
    for (int64_t i = 1; i < n; ++i) {
        const int64_t rank = ranks[i];
        int64_t j = i;
        for (; j > 0 && ranked_index(ranks[j - 1]) > ranked_index(rank); --j) ranks[j] = ranks[j - 1];
        ranks[j] = rank;
    }
}

// The memory of indices [K] is also used for ranks.
template <class T>
void prune_group(const T* scores, int64_t begin, int64_t n, int64_t k, const PruneArgs& args,
                 int64_t* indices) {
    for (int64_t i = k; i < args.width; ++i) indices[i] = -1;
    if (k == 0) return;
    if (args.width <= kFew) {
        select_few(scores + begin, n, static_cast<int>(k), indices);
        if (args.keep_order) sort_by_index(indices, k);
    } else {
        select_many(scores + begin, n, k, args.keys + begin, indices);
        if (!args.keep_order) sort_ranks(indices, k);
    }
    for (int64_t i = 0; i < k; ++i) indices[i] = begin + ranked_index(indices[i]);
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
