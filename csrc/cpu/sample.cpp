// sample: one token from a row of logits [V], after temperature, top-k, top-p and min-p.
//
// Every token's weight is an integer (fixed_exp.h), so all sums are exact, in any order:
//
//   weight(l) = round(w(l)), w(l) = 2**39 exp((l - max) / T)
//   top-k:  keep l >= the k-th largest
//   top-p:  keep the fewest, best first and lower id first on ties, whose weights reach ceil(top_p * sum)
//   min-p:  keep w(l) >= 2**39 min_p
//   draw:   the first id whose running sum of kept weights exceeds floor(r * sum / 2**64), r from Philox
//
// Nothing is sorted. Top-k and top-p are reduced to one logit, the cut, and the number of kept tokens that
// equal it. Pass 1 (scan) brings the row into the cache and finds the maximum. Unless T is 1, it also sums up
// exp(l) for the log-probability, in blocks of 1024 logits, each relative to its own maximum. So memory is
// waited for only once, and half of the arithmetic is done meanwhile. A sketch of the row gives a bracket
// [low, high] that probably contains the cut. Pass 2 (weigh) adds up the weights of each block, with those
// above the bracket apart, and lists the logits inside. The exact cut is found in the list, and the draw
// reads one block again. If the bracket does not contain the cut, which is rare, pass 2 runs again with one
// that contains everything; the result is the same. Cost: one row from memory and one from the cache; 2 V
// exponentials, V if the temperature is 0 or 1.
#include "sample.h"

#include "integers.h"
#include "philox.h"
#include "select.h"
#include "sketch.h"
#include "vec.h"
#include "vec_fixed_exp.h"

TTS_BEGIN_ISA

namespace {

constexpr float kLargest = 3.40282347e38f;
constexpr int64_t kAll = INT64_MAX;
constexpr int64_t kSketchFrom = 8192;  // shorter rows are listed as a whole
constexpr int64_t kLongList = 4096;    // longer lists are shortened before selection

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
float max(float a, float b) { return a > b ? a : b; }
float min(float a, float b) { return a < b ? a : b; }

int64_t blocks_of(const SampleRow& row) { return divide_up(row.vocab, kSampleBlock); }

int64_t whole_vectors(int64_t n) { return (n + Vec::width - 1) / Vec::width * Vec::width; }

// Calls f with the row's logits as a pointer to their type.
template <class F>
auto with_logits(const SampleRow& row, F f) {
    return dispatch(row.logits.dtype, [&](auto* type) {
        return f(static_cast<decltype(type)>(const_cast<void*>(row.logits.data)));
    });
}

float logit_at(const SampleRow& row, int64_t i) {
    return with_logits(row, [&](const auto* x) { return to_float(x[i]); });
}

// Calls f(logits, n) for block b of the row, with n a multiple of the vector width. If the last block is
// shorter, it is copied and padded with -inf, which is never the maximum, has weight 0 and is never listed.
template <class F>
void with_block(const SampleRow& row, int64_t b, F f) {
    with_logits(row, [&](const auto* x) {
        x += b * kSampleBlock;
        const int64_t n = least(kSampleBlock, row.vocab - b * kSampleBlock), filled = whole_vectors(n);
        if (n == filled) return f(x, n);
        float copy[kSampleBlock];
        for (int64_t i = 0; i < filled; ++i) copy[i] = i < n ? to_float(x[i]) : -kInfinity;
        f(static_cast<const float*>(copy), filled);
    });
}

FixedExp weight_function(const SampleRow& row) {
    const float temperature = row.options.temperature;
    return FixedExp(temperature == 0.0f ? 1.0f : temperature);
}

bool is_greedy(const SampleRow& row) { return row.options.temperature == 0.0f; }
bool is_tempered(const SampleRow& row) { return row.options.temperature != 1.0f; }
bool has_top_k(const SampleRow& row) { return row.options.top_k > 0 && row.options.top_k < row.vocab; }
bool has_top_p(const SampleRow& row) { return row.options.top_p < 1.0f; }
bool has_min_p(const SampleRow& row) { return row.options.min_p > 0.0f; }
bool is_cut(const SampleRow& row) { return has_top_k(row) || has_top_p(row) || has_min_p(row); }

// x * weight / 2**39
uint64_t scaled(uint64_t x, uint64_t weight) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(x) * weight) >> kWeightBits);
}

uint64_t weight_of(FixedExp exp, float x) {
    uint64_t lanes[Vec::width];
    Units::of(exp(Vec::all(x))).store(lanes);
    return lanes[0];
}

// ---- pass 1 -----------------------------------------------------------------------------------------------

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

template <class T>
uint64_t block_sum(const T* x, int64_t n, float top) {
    const FixedExp exp = FixedExp(1.0f);
    Units sum = Units::zero();
    for (int64_t i = 0; i < n; i += Vec::width) sum.add(Units::of(exp(Vec::load(x + i) - Vec::all(top))));
    return sum.sum();
}

// ---- the bracket ------------------------------------------------------------------------------------------

// Logits below the floor have weight 0, or a smaller one than min-p requires.
void choose_floor(const SampleRow& row, SampleWorkspace& space, FixedExp exp) {
    float depth = exp.lowest;
    // Top-p needs the sum of all logits that are left after top-k, so min-p must not remove any before.
    if (has_min_p(row) && !(has_top_k(row) && has_top_p(row))) {
        const int octaves =
            128 - static_cast<int>(float_bits(row.options.min_p) >> 23);  // min_p > 2**-octaves
        depth = max(depth, static_cast<float>(-octaves) / exp.scale);
    }
    space.floor = max(space.max + depth, -kLargest);
}

void choose_bracket(const SampleRow& row, SampleWorkspace& space, FixedExp exp) {
    space.low = space.floor;
    space.high = kInfinity;
    if (row.vocab < kSketchFrom || space.widened || !(has_top_k(row) || has_top_p(row))) return;
    const Bracket found = with_logits(row, [&](const auto* x) {
        const Sketch sketch(x, row.vocab, space.max, exp);
        return has_top_k(row) ? sketch.kth(row.options.top_k)
                              : sketch.tail_of_guess(1.0f - row.options.top_p);
    });
    space.low = max(space.low, found.low);
    // The list must contain the logits for all of the options.
    const bool alone = has_top_k(row) + has_top_p(row) + has_min_p(row) == 1;
    if (alone && found.high > space.low) space.high = found.high;
}

// ---- pass 2 -----------------------------------------------------------------------------------------------

// Pads the list of one block to whole vectors; returns its new end.
float* fill_up(const float* list, float* end) {
    while ((end - list) % Vec::width) *end++ = -kInfinity;
    return end;
}

// Adds up one block and appends the logits inside the bracket to `list`; returns the list's new end.
template <bool kCut, class T>
float* weigh_block(const T* x, int64_t n, const SampleWorkspace& space, FixedExp exp, SampleBlock& block,
                   float* list) {
    const Vec top = Vec::all(space.max), low = Vec::all(space.low), high = Vec::all(space.high);
    Units all = Units::zero(), above = all;
    int64_t above_count = 0;
    float* end = list;
    for (int64_t i = 0; i < n; i += Vec::width) {
        const Vec v = Vec::load(x + i);
        const Units weights = Units::of(exp(v - top));
        all.add(weights);
        if constexpr (kCut) {
            const Mask over = greater(v, high), inside = without(greater_equal(v, low), over);
            above.add(weights, over);
            above_count += __builtin_popcount(over.bits());
            if (inside.bits()) end += compress(v, inside, end);
        }
    }
    block.all = all.sum();
    block.above = kCut ? above.sum() : block.all;
    block.above_count = static_cast<int32_t>(above_count);
    block.listed = static_cast<int32_t>(end - list);
    return fill_up(list, end);
}

// ---- the list ---------------------------------------------------------------------------------------------

// Calls f(block, its list, length in whole vectors) for each block, in order.
template <class F>
void over_list(const SampleRow& row, SampleWorkspace& space, F f) {
    const float* list = nullptr;
    for (int64_t b = 0; b < blocks_of(row); ++b) {
        if (b % kSampleChunk == 0) list = space.list + b * kSampleBlock;
        const int64_t n = whole_vectors(space.blocks[b].listed);
        f(space.blocks[b], list, n);
        list += n;
    }
}

// Narrows the bracket, and the list with it.
void narrow(const SampleRow& row, SampleWorkspace& space, FixedExp exp, Bracket bracket) {
    space.low = max(space.low, bracket.low);
    space.high = min(space.high, bracket.high);
    const Vec top = Vec::all(space.max), low = Vec::all(space.low), high = Vec::all(space.high);
    float *list = nullptr, *end = nullptr;  // writes stay behind reads
    int64_t b = 0;
    over_list(row, space, [&](SampleBlock& block, const float* x, int64_t n) {
        list = end = b++ % kSampleChunk == 0 ? const_cast<float*>(x) : end;
        Units above = Units::zero();
        for (int64_t i = 0; i < n; i += Vec::width) {
            const Vec v = Vec::load(x + i);
            const Mask over = greater(v, high), inside = without(greater_equal(v, low), over);
            above.add(Units::of(exp(v - top)), over);
            block.above_count += __builtin_popcount(over.bits());
            end += compress(v, inside, end);
        }
        block.above += above.sum();
        block.listed = static_cast<int32_t>(end - list);
        end = fill_up(list, end);
    });
}

// Copies the list without its gaps, and the weights; returns the length.
int64_t pick(const SampleRow& row, SampleWorkspace& space, FixedExp exp) {
    int64_t count = 0;
    over_list(row, space, [&](const SampleBlock& block, const float* x, int64_t n) {
        for (int64_t i = 0; i < n; i += Vec::width) {
            const Vec v = Vec::load(x + i);
            v.store(space.picked + count + i);
            Units::of(exp(v - Vec::all(space.max))).store(space.weights + count + i);
        }
        count += block.listed;
    });
    return count;
}

// ---- the cut ----------------------------------------------------------------------------------------------

// The logits above `logit` are kept, and the first `ties` of those equal to it, if w reaches `least`.
struct Cut {
    float logit = -kInfinity;
    int64_t ties = kAll;
    float least = 0.0f;
};

// ceil(fraction * total), the fraction rounded up to a multiple of 2**-32.
uint64_t part_of(float fraction, uint64_t total) {
    const double scaled = static_cast<double>(fraction) * 0x1p32;
    uint64_t parts = static_cast<uint64_t>(scaled);
    if (static_cast<double>(parts) < scaled) ++parts;
    return static_cast<uint64_t>((static_cast<unsigned __int128>(parts) * total + 0xffffffffu) >> 32);
}

struct Totals {
    uint64_t all = 0, above = 0, above_count = 0;
    int64_t listed = 0;
};

Totals add_up(const SampleRow& row, const SampleWorkspace& space) {
    Totals t;
    for (int64_t b = 0; b < blocks_of(row); ++b) {
        const SampleBlock& block = space.blocks[b];
        t.all += block.all;
        t.above += block.above;
        t.above_count += static_cast<uint64_t>(block.above_count);
        t.listed += block.listed;
    }
    return t;
}

// Computes each block's kept weight; returns the sum.
uint64_t add_kept(const SampleRow& row, SampleWorkspace& space, FixedExp exp, const Cut& cut) {
    const Vec top = Vec::all(space.max), logit = Vec::all(cut.logit), heavy = Vec::all(cut.least);
    uint64_t total = 0;
    int64_t ties_left = cut.ties;
    over_list(row, space, [&](SampleBlock& block, const float* x, int64_t n) {
        Units kept = Units::zero(), tied = kept;
        int64_t ties = 0;
        for (int64_t i = 0; i < n; i += Vec::width) {
            const Vec v = Vec::load(x + i), w = exp(v - top);
            const Units weights = Units::of(w).where(greater_equal(w, heavy));
            kept.add(weights, greater(v, logit));
            const Mask equals = equal(v, logit);
            ties += __builtin_popcount(equals.bits());
            tied.add(weights, equals);
        }
        block.kept = block.above + kept.sum();
        block.ties = static_cast<int32_t>(least(ties, ties_left));
        if (ties) block.kept += tied.sum() / static_cast<uint64_t>(ties) * static_cast<uint64_t>(block.ties);
        ties_left -= block.ties;
        total += block.kept;
    });
    return total;
}

Selected select_by_weight(const SampleRow& row, SampleWorkspace& space, FixedExp exp, uint64_t target) {
    const int64_t n = pick(row, space, exp);
    return select(space.picked, space.weights, n, space.low, min(space.high, space.max), target);
}

Selected select_by_count(const SampleRow& row, SampleWorkspace& space, FixedExp exp, uint64_t target) {
    const int64_t n = pick(row, space, exp);
    return select(space.picked, nullptr, n, space.low, min(space.high, space.max), target);
}

// Top-k; sets `all` to the sum that is left. False if the k-th largest is not in the list.
bool cut_top_k(const SampleRow& row, SampleWorkspace& space, FixedExp exp, Totals& totals, Cut& cut) {
    const uint64_t k = static_cast<uint64_t>(row.options.top_k);
    if (k <= totals.above_count) return false;
    const Selected s = select_by_count(row, space, exp, k - totals.above_count);
    if (!s.found)
        return space.low <= space.floor;  // it may be below the floor: then all that counts is listed
    cut.logit = s.value;
    if (has_top_p(row)) totals.all = add_kept(row, space, exp, cut);
    return true;
}

// Top-p of `totals.all`. False if the cut is not in the list.
bool cut_top_p(const SampleRow& row, SampleWorkspace& space, FixedExp exp, Totals& totals, Cut& cut) {
    const uint64_t target = part_of(row.options.top_p, totals.all);
    if (totals.listed > kLongList && row.vocab >= kSketchFrom && !space.widened && !has_top_k(row) &&
        !has_min_p(row)) {  // the sum is known now, so a better bracket is possible
        const double tail = static_cast<double>(totals.all - target) / static_cast<double>(kOne);
        narrow(row, space, exp, with_logits(row, [&](const auto* x) {
                   return Sketch(x, row.vocab, space.max, exp).tail_of(tail);
               }));
        totals = add_up(row, space);
    }
    if (target <= totals.above) return false;
    const Selected s = select_by_weight(row, space, exp, target - totals.above);
    if (!s.found) return space.low <= space.floor;
    const uint64_t weight = weight_of(exp, s.value - space.max);
    cut.logit = s.value;
    cut.ties = static_cast<int64_t>((target - totals.above - s.above + weight - 1) / weight);
    return true;
}

bool find_cut(const SampleRow& row, SampleWorkspace& space, FixedExp exp, Cut& cut) {
    Totals totals = add_up(row, space);
    if (has_top_k(row) && !cut_top_k(row, space, exp, totals, cut)) return false;
    if (has_top_p(row) && !cut_top_p(row, space, exp, totals, cut)) return false;
    cut.least = row.options.min_p * static_cast<float>(kOne);
    return true;
}

// ---- the draw ---------------------------------------------------------------------------------------------

// floor(r * total / 2**64)
uint64_t draw_below(const SampleOptions& options, uint64_t total) {
    const uint64_t r = philox_draw(options.seed, options.offset);
    return static_cast<uint64_t>((static_cast<unsigned __int128>(r) * total) >> 64);
}

// The token of block b at which the running sum of kept weights exceeds `target`.
int64_t token_in_block(const SampleRow& row, const SampleWorkspace& space, FixedExp exp, const Cut& cut,
                       int64_t b, uint64_t target) {
    int64_t token = -1;
    with_block(row, b, [&](const auto* x, int64_t n) {
        uint64_t weights[kSampleBlock], sum = 0;
        const Vec logit = Vec::all(cut.logit), heavy = Vec::all(cut.least);
        for (int64_t i = 0; i < n; i += Vec::width) {
            const Vec v = Vec::load(x + i), w = exp(v - Vec::all(space.max));
            Units::of(w).where(greater_equal(w, heavy)).where(greater_equal(v, logit)).store(weights + i);
        }
        int64_t ties_left = space.blocks[b].ties;
        for (int64_t i = 0; token < 0; ++i) {
            if (to_float(x[i]) != cut.logit || ties_left-- > 0) sum += weights[i];
            if (sum > target) token = b * kSampleBlock + i;
        }
    });
    return token;
}

int64_t draw_token(const SampleRow& row, SampleWorkspace& space, FixedExp exp, const Cut& cut,
                   uint64_t total) {
    uint64_t target = draw_below(row.options, total);
    int64_t b = 0;
    for (; target >= space.blocks[b].kept; ++b) target -= space.blocks[b].kept;
    return token_in_block(row, space, exp, cut, b, target);
}

// The sum of all exp(l - max) from the sums of blocks, which are relative to the blocks' maxima.
uint64_t add_untempered(const SampleRow& row, const SampleWorkspace& space) {
    const FixedExp exp = FixedExp(1.0f);
    uint64_t total = 0;
    for (int64_t b = 0; b < blocks_of(row); ++b) {
        total += scaled(space.blocks[b].untempered, weight_of(exp, space.blocks[b].max - space.max));
    }
    return total;
}

int64_t first_largest(const SampleRow& row, const SampleWorkspace& space) {
    int64_t b = 0;
    while (space.blocks[b].max != space.max) ++b;
    int64_t token = b * kSampleBlock;
    while (logit_at(row, token) != space.max) ++token;
    return token;
}

// A row with +inf: each such logit has weight 1 and all others 0.
SampleDraw draw_infinite(const SampleRow& row) {
    uint64_t infinite = 0;
    bool finite = false;
    for (int64_t i = 0; i < row.vocab; ++i) {
        const float x = logit_at(row, i);
        infinite += x == kInfinity;
        finite |= x - x == 0.0f;
    }
    if (!finite) return {-1, 0.0f, 0.0f, 0};
    uint64_t target = is_greedy(row) ? 0 : draw_below(row.options, part_of(row.options.top_p, infinite));
    int64_t token = 0;
    while (logit_at(row, token) != kInfinity || target-- != 0) ++token;
    return {token, 0.0f, 0.0f, infinite << kWeightBits};
}

}  // namespace

// ---- the steps --------------------------------------------------------------------------------------------

void sample_scan(const SampleRow& row, SampleWorkspace& space, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
        with_block(row, b, [&](const auto* x, int64_t n) {
            SampleBlock& block = space.blocks[b];
            block.max = block_max(x, n);
            if (is_tempered(row)) block.untempered = block_sum(x, n, block.max);
        });
    }
}

bool sample_plan(const SampleRow& row, SampleWorkspace& space, SampleDraw& draw) {
    bool nan = false;
    space.max = -kInfinity;
    for (int64_t b = 0; b < blocks_of(row); ++b) {
        nan |= is_nan(space.blocks[b].max);
        space.max = max(space.max, space.blocks[b].max);
    }
    draw = {-1, 0.0f, 0.0f, 0};
    if (nan || space.max == -kInfinity) return false;
    if (space.max == kInfinity) {
        draw = draw_infinite(row);
        return false;
    }
    if (is_tempered(row)) space.untempered = add_untempered(row, space);
    if (is_greedy(row)) {
        draw = {first_largest(row, space), space.max, space.max, space.untempered};
        return false;
    }
    space.widened = false;
    const FixedExp exp = weight_function(row);
    choose_floor(row, space, exp);
    if (is_cut(row)) choose_bracket(row, space, exp);
    return true;
}

void sample_weigh(const SampleRow& row, SampleWorkspace& space, int64_t begin, int64_t end) {
    const FixedExp exp = weight_function(row);
    const bool cut = is_cut(row);
    float* list = nullptr;
    for (int64_t b = begin; b < end; ++b) {
        if (b % kSampleChunk == 0) list = space.list + b * kSampleBlock;
        with_block(row, b, [&](const auto* x, int64_t n) {
            list = cut ? weigh_block<true>(x, n, space, exp, space.blocks[b], list)
                       : weigh_block<false>(x, n, space, exp, space.blocks[b], list);
        });
    }
}

bool sample_draw(const SampleRow& row, SampleWorkspace& space, SampleDraw& draw) {
    const FixedExp exp = weight_function(row);
    uint64_t all = 0;
    for (int64_t b = 0; b < blocks_of(row); ++b) all += space.blocks[b].kept = space.blocks[b].all;
    if (!is_tempered(row)) space.untempered = all;
    Cut cut;
    if (is_cut(row)) {
        if (!find_cut(row, space, exp, cut)) {
            space.widened = true;
            choose_bracket(row, space, exp);
            return false;
        }
        all = add_kept(row, space, exp, cut);
    }
    const int64_t token = draw_token(row, space, exp, cut, all);
    draw = {token, logit_at(row, token), space.max, space.untempered};
    return true;
}

// Ids ascend, so a logit that equals the k-th one comes too late. A block is skipped if its maximum is not
// larger: this takes one pass over few of the blocks, and about k log(V / k) insertions.
void sample_likeliest(const SampleRow& row, const SampleWorkspace& space, int64_t k, int64_t* ids,
                      float* logits) {
    int64_t held = 0;
    const auto insert = [&](float x, int64_t id) {
        int64_t at = held < k ? held++ : k - 1;
        for (; at > 0 && logits[at - 1] < x; --at) {
            logits[at] = logits[at - 1];
            ids[at] = ids[at - 1];
        }
        logits[at] = x;
        ids[at] = id;
    };
    for (int64_t b = 0; b < blocks_of(row); ++b) {
        if (held == k && space.blocks[b].max <= logits[k - 1]) continue;
        const int64_t begin = b * kSampleBlock, end = least(begin + kSampleBlock, row.vocab);
        int64_t id = begin;
        for (; id < end && held < k; ++id) insert(logit_at(row, id), id);
        with_block(row, b, [&](const auto* x, int64_t n) {
            for (int64_t i = (id - begin) / Vec::width * Vec::width; i < n; i += Vec::width) {
                if (!greater(Vec::load(x + i), Vec::all(logits[k - 1])).bits()) continue;
                for (int64_t j = i; j < i + Vec::width; ++j) {
                    if (begin + j >= id && to_float(x[j]) > logits[k - 1]) insert(to_float(x[j]), begin + j);
                }
            }
        });
    }
}

TTS_END_ISA
