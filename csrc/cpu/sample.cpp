// sample: one token a row from logits [V], after temperature, top-k, top-p and min-p.
//
// Every token's weight is an integer (fixed_exp.h), so that all sums are exact and in any order the same:
//
//   weight(l) = round(2**39 exp((l - max) / T))
//   top-k:  keep l >= the k-th largest
//   top-p:  keep the fewest, best first and lower id first on ties, whose weights reach ceil(top_p * sum)
//   min-p:  keep weight >= ceil(min_p * 2**39)
//   draw:   the first id at which the running sum of kept weights exceeds floor(r * sum / 2**64), r from
//   Philox
//
// Nothing is sorted. Top-k and top-p each come down to one logit, the cut, and a number of tokens equal to
// it. Pass 1 (scan) finds the maximum. Pass 2 (weigh) reads the row a second time, out of the cache: it adds
// up the weights block by block, those above a bracket [low, high] apart, and lists the logits inside the
// bracket. The cut is then found exactly in the short list by radix selection, and the draw looks at one
// block again. Should the cut lie outside the bracket, pass 2 runs once more with a bracket that holds
// everything. Cost: V exponentials (2 V if the temperature is not 1: `logprobs` are untempered), one row of
// memory traffic.
#include "sample.h"

#include "fixed_exp.h"
#include "philox.h"
#include "vec.h"

TTS_BEGIN_ISA

namespace {

constexpr float kLargest = 3.40282347e38f;
constexpr int64_t kAll = INT64_MAX;
constexpr int64_t kBlocksPerChunk = kSampleChunk / kSampleBlock;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t blocks_of(const SampleRow& row) { return (row.vocab + kSampleBlock - 1) / kSampleBlock; }

// Calls f(logits, n) for block b of the row; n is a multiple of the vector width. The last block is copied as
// float32 and filled up with -inf, which is never the maximum, weighs nothing and is never listed.
template <class F>
void with_block(const SampleRow& row, int64_t b, F f) {
    dispatch(row.logits.dtype, [&](auto* type) {
        const auto* x = static_cast<decltype(type)>(const_cast<void*>(row.logits.data)) + b * kSampleBlock;
        const int64_t n = least(kSampleBlock, row.vocab - b * kSampleBlock);
        if (n % Vec::width == 0) return f(x, n);
        alignas(64) float filled[kSampleBlock];
        const int64_t up = (n + Vec::width - 1) / Vec::width * Vec::width;
        for (int64_t i = 0; i < up; ++i) filled[i] = i < n ? to_float(x[i]) : -kInfinity;
        f(static_cast<const float*>(filled), up);
    });
}

// ---- pass 1
// ----------------------------------------------------------------------------------------------------

template <class T>
float block_max(const T* x, int64_t n) {
    Vec best = Vec::all(-kInfinity);
    Mask nan = is_nan(best);
    for (int64_t i = 0; i < n; i += Vec::width) {
        const Vec v = Vec::load(x + i);
        best = max(v, best);
        nan = nan | is_nan(v);
    }
    return nan.bits() ? __builtin_nanf("") : reduce_max(best);
}

// ---- pass 2
// ----------------------------------------------------------------------------------------------------

// Adds up one block and appends the logits inside the bracket to `list`; returns the list's new end.
template <bool kTempered, bool kCut, class T>
float* weigh_block(const T* x, int64_t n, const SampleWorkspace& space, FixedExp tempered, SampleBlock& block,
                   float* list) {
    const FixedExp untempered = FixedExp::at(1.0f);
    const Vec top = Vec::all(space.max), low = Vec::all(space.low), high = Vec::all(space.high);
    Units all = Units::zero(), plain = all, above = all;
    int64_t above_count = 0;
    float* end = list;
    for (int64_t i = 0; i < n; i += Vec::width) {
        const Vec v = Vec::load(x + i), d = v - top;
        const Units u = Units::of(tempered(d));
        all.add(u);
        if constexpr (kTempered) plain.add(Units::of(untempered(d)));
        if constexpr (kCut) {
            const Mask over = greater(v, high), inside = without(greater_equal(v, low), over);
            above.add(u, over);
            above_count += __builtin_popcount(over.bits());
            if (inside.bits()) end += compress(v, inside, end);
        }
    }
    block.all = all.sum();
    block.untempered = kTempered ? plain.sum() : block.all;
    block.above = kCut ? above.sum() : block.all;
    block.above_count = static_cast<int32_t>(above_count);
    block.listed = static_cast<int32_t>(end - list);
    return end;
}

// ---- the cut
// ---------------------------------------------------------------------------------------------------

// Kept are the logits above `logit` and the first `ties` of those equal to it, of a weight of at least
// min_weight.
struct Cut {
    float logit;
    int64_t ties;
    uint64_t min_weight;

    bool keeps(float x, uint64_t weight, int64_t& ties_left) const {
        if (weight < min_weight || x < logit) return false;
        return x > logit || ties_left-- > 0;
    }
};

// Floats in ascending order as unsigned numbers; -0.0 as 0.0.
uint32_t order(float x) {
    const uint32_t bits = float_bits(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float from_order(uint32_t key) { return bit_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

struct Selected {
    bool found;
    float logit;     // the largest whose measure, with all above it, reaches the target
    uint64_t above;  // measure of all above it
};

// Finds in x [n], inside [low, high], where the measure from the top down reaches `target`. A logit measures
// its weight, or 1 where `weights` is null. Radix selection: a histogram over the keys' leading bits, then
// over those of the one bin that matters.
Selected select(const float* x, const uint64_t* weights, int64_t n, float low, float high, uint64_t target,
                SampleWorkspace& space) {
    constexpr int kBins = 1024;
    uint32_t first = order(low), last = order(high);
    uint64_t above = 0;
    for (;;) {
        int shift = 0;
        while (((last - first) >> shift) >= kBins) ++shift;
        uint64_t bins[kBins] = {};
        for (int64_t i = 0; i < n; ++i) bins[(order(x[i]) - first) >> shift] += weights ? weights[i] : 1;
        int bin = static_cast<int>((last - first) >> shift);
        while (bin >= 0 && above + bins[bin] < target) above += bins[bin--];
        if (bin < 0) return {false, 0.0f, above};
        first += static_cast<uint32_t>(bin) << shift;
        if (shift == 0) return {true, from_order(first), above};
        const uint32_t width = (uint32_t{1} << shift) - 1;
        if (last - first > width) last = first + width;
        int64_t kept = 0;
        for (int64_t i = 0; i < n; ++i) {
            if (order(x[i]) - first > last - first) continue;
            space.scratch_list[kept] = x[i];
            if (weights) space.scratch_weights[kept] = weights[i];
            ++kept;
        }
        x = space.scratch_list;
        if (weights) weights = space.scratch_weights;
        n = kept;
    }
}

// Joins the chunks' lists and fills in the weights; returns the length.
int64_t gather_list(const SampleRow& row, SampleWorkspace& space, FixedExp exp) {
    int64_t n = 0;
    const int64_t blocks = blocks_of(row);
    for (int64_t b = 0; b < blocks;) {
        const float* from = space.list + b * kSampleBlock;
        const int64_t end = least(b + kBlocksPerChunk, blocks);
        for (; b < end; ++b) {
            for (int64_t i = 0; i < space.blocks[b].listed; ++i) space.list[n++] = *from++;
        }
    }
    for (int i = 0; i < Vec::width; ++i) space.list[n + i] = -kInfinity;
    const Vec top = Vec::all(space.max);
    for (int64_t i = 0; i < n; i += Vec::width) {
        Units::of(exp(Vec::load(space.list + i) - top)).store(space.weights + i);
    }
    return n;
}

// ceil(fraction * total), with the fraction rounded up to a multiple of 2**-32.
uint64_t part_of(float fraction, uint64_t total) {
    const double scaled = static_cast<double>(fraction) * 0x1p32;
    uint64_t parts = static_cast<uint64_t>(scaled);
    if (static_cast<double>(parts) < scaled) ++parts;
    return static_cast<uint64_t>((static_cast<unsigned __int128>(parts) * total + 0xffffffffu) >> 32);
}

uint64_t least_weight(float min_p) {
    const double scaled = static_cast<double>(min_p) * static_cast<double>(kOne);
    const uint64_t units = static_cast<uint64_t>(scaled);
    return static_cast<double>(units) < scaled ? units + 1 : units;
}

// Top-k, then top-p of what is left, in the list [n]. False if the cut is not in the list.
bool find_cut(const SampleRow& row, SampleWorkspace& space, int64_t n, Cut& cut) {
    const SampleOptions& options = row.options;
    uint64_t total = 0, above = 0, above_count = 0;
    const int64_t blocks = blocks_of(row);
    for (int64_t b = 0; b < blocks; ++b) {
        total += space.blocks[b].all;
        above += space.blocks[b].above;
        above_count += static_cast<uint64_t>(space.blocks[b].above_count);
    }
    // A cut below the list is a miss, unless what is below the list cannot be drawn anyway.
    const bool complete = space.low <= space.floor;
    const float high = space.high < space.max ? space.high : space.max;
    cut = {-kInfinity, kAll, least_weight(options.min_p)};
    if (options.top_k > 0 && options.top_k < row.vocab) {
        const uint64_t k = static_cast<uint64_t>(options.top_k);
        if (k <= above_count) return false;
        const Selected s = select(space.list, nullptr, n, space.low, high, k - above_count, space);
        if (!s.found && !complete) return false;
        if (s.found) {
            cut.logit = s.logit;
            total = above;
            for (int64_t i = 0; i < n; ++i) total += space.list[i] >= s.logit ? space.weights[i] : 0;
        }
    }
    if (options.top_p < 1.0f) {
        const uint64_t target = part_of(options.top_p, total);
        if (target <= above) return false;
        const Selected s = select(space.list, space.weights, n, space.low, high, target - above, space);
        if (!s.found && !complete) return false;
        if (s.found) {
            uint64_t weight = 0;
            for (int64_t i = 0; !weight; ++i) weight = space.list[i] == s.logit ? space.weights[i] : 0;
            cut.logit = s.logit;
            cut.ties = static_cast<int64_t>((target - above - s.above + weight - 1) / weight);
        }
    }
    return true;
}

// ---- the draw
// --------------------------------------------------------------------------------------------------

// floor(r * total / 2**64)
uint64_t draw_below(const SampleOptions& options, uint64_t total) {
    const uint64_t r = philox_draw(options.seed, options.offset);
    return static_cast<uint64_t>((static_cast<unsigned __int128>(r) * total) >> 64);
}

float logit_at(const SampleRow& row, int64_t i) {
    return dispatch(row.logits.dtype, [&](auto* type) {
        return to_float(static_cast<decltype(type)>(const_cast<void*>(row.logits.data))[i]);
    });
}

// The token of block b at which the running sum of kept weights exceeds `target`.
int64_t token_in_block(const SampleRow& row, const SampleWorkspace& space, FixedExp exp, const Cut& cut,
                       int64_t b, uint64_t target, int64_t ties_left) {
    int64_t token = -1;
    with_block(row, b, [&](const auto* x, int64_t n) {
        alignas(64) uint64_t weights[kSampleBlock];
        for (int64_t i = 0; i < n; i += Vec::width) {
            Units::of(exp(Vec::load(x + i) - Vec::all(space.max))).store(weights + i);
        }
        uint64_t sum = 0;
        for (int64_t i = 0; i < n && token < 0; ++i) {
            if (cut.keeps(to_float(x[i]), weights[i], ties_left)) sum += weights[i];
            if (sum > target) token = b * kSampleBlock + i;
        }
    });
    return token;
}

// The kept weight of each block goes to `above`; returns their sum.
uint64_t add_kept(const SampleRow& row, SampleWorkspace& space, const Cut& cut) {
    uint64_t total = 0;
    int64_t ties_left = cut.ties, i = 0;
    const int64_t blocks = blocks_of(row);
    for (int64_t b = 0; b < blocks; ++b) {
        SampleBlock& block = space.blocks[b];
        for (const int64_t end = i + block.listed; i < end; ++i) {
            if (cut.keeps(space.list[i], space.weights[i], ties_left)) block.above += space.weights[i];
        }
        total += block.above;
    }
    return total;
}

int64_t draw_token(const SampleRow& row, SampleWorkspace& space, FixedExp exp, const Cut& cut) {
    uint64_t target = draw_below(row.options, add_kept(row, space, cut));
    int64_t b = 0, ties_left = cut.ties;
    const float* listed = space.list;
    for (; target >= space.blocks[b].above; ++b) {
        target -= space.blocks[b].above;
        for (int64_t i = 0; i < space.blocks[b].listed; ++i) ties_left -= *listed++ == cut.logit;
    }
    return token_in_block(row, space, exp, cut, b, target, ties_left);
}

int64_t first_equal(const SampleRow& row, const SampleWorkspace& space) {
    int64_t b = 0;
    while (space.blocks[b].max != space.max) ++b;
    int64_t token = b * kSampleBlock;
    while (logit_at(row, token) != space.max) ++token;
    return token;
}

// A row with +inf: each such logit weighs 1 and all others nothing.
SampleDraw draw_infinite(const SampleRow& row) {
    uint64_t infinite = 0;
    bool finite = false;
    for (int64_t i = 0; i < row.vocab; ++i) {
        const float x = logit_at(row, i);
        infinite += x == kInfinity;
        finite |= x - x == 0.0f;
    }
    if (!finite) return {-1, 0.0f, 0.0f, 0};
    const SampleOptions& options = row.options;
    uint64_t target = 0;
    if (options.temperature > 0.0f) target = draw_below(options, part_of(options.top_p, infinite));
    int64_t token = 0;
    for (;; ++token) {
        if (logit_at(row, token) == kInfinity && target-- == 0) break;
    }
    return {token, 0.0f, 0.0f, infinite << kWeightBits};
}

}  // namespace

// ---- the steps
// -------------------------------------------------------------------------------------------------

void sample_scan(const SampleRow& row, SampleWorkspace& space, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
        with_block(row, b, [&](const auto* x, int64_t n) { space.blocks[b].max = block_max(x, n); });
    }
}

bool sample_plan(const SampleRow& row, SampleWorkspace& space, SampleDraw& draw) {
    const SampleOptions& options = row.options;
    const int64_t blocks = blocks_of(row);
    space.max = -kInfinity;
    bool nan = false;
    for (int64_t b = 0; b < blocks; ++b) {
        const float x = space.blocks[b].max;
        nan |= is_nan(x);
        if (x > space.max) space.max = x;
    }
    draw = {-1, 0.0f, 0.0f, 0};
    if (nan || space.max == -kInfinity) return false;
    if (space.max == kInfinity) {
        draw = draw_infinite(row);
        return false;
    }
    space.tempered = options.temperature != 0.0f && options.temperature != 1.0f;
    space.cut = options.temperature != 0.0f && ((options.top_k > 0 && options.top_k < row.vocab) ||
                                                options.top_p < 1.0f || options.min_p > 0.0f);
    const FixedExp exp = FixedExp::at(space.tempered ? options.temperature : 1.0f);
    const float floor = space.max + exp.lowest;
    space.floor = floor < -kLargest ? -kLargest : floor;
    space.low = space.floor;
    space.high = kInfinity;
    return true;
}

void sample_weigh(const SampleRow& row, SampleWorkspace& space, int64_t begin, int64_t end) {
    const FixedExp exp = FixedExp::at(space.tempered ? row.options.temperature : 1.0f);
    float* list = nullptr;
    for (int64_t b = begin; b < end; ++b) {
        if (b % kBlocksPerChunk == 0) list = space.list + b * kSampleBlock;
        SampleBlock& block = space.blocks[b];
        with_block(row, b, [&](const auto* x, int64_t n) {
            if (space.cut) {
                list = space.tempered ? weigh_block<true, true>(x, n, space, exp, block, list)
                                      : weigh_block<false, true>(x, n, space, exp, block, list);
            } else {
                list = space.tempered ? weigh_block<true, false>(x, n, space, exp, block, list)
                                      : weigh_block<false, false>(x, n, space, exp, block, list);
            }
        });
    }
}

bool sample_draw(const SampleRow& row, SampleWorkspace& space, SampleDraw& draw) {
    const FixedExp exp = FixedExp::at(space.tempered ? row.options.temperature : 1.0f);
    Cut cut{-kInfinity, kAll, 0};
    if (space.cut) {
        const int64_t n = gather_list(row, space, exp);
        if (!find_cut(row, space, n, cut)) {
            space.low = space.floor;
            space.high = kInfinity;
            return false;
        }
    }
    const bool greedy = row.options.temperature == 0.0f;
    const int64_t token = greedy ? first_equal(row, space) : draw_token(row, space, exp, cut);
    uint64_t untempered = 0;
    const int64_t blocks = blocks_of(row);
    for (int64_t b = 0; b < blocks; ++b) untempered += space.blocks[b].untempered;
    draw = {token, logit_at(row, token), space.max, untempered};
    return true;
}

TTS_END_ISA
