// linear with weights of 8 or 4 bits. Rows of x are converted to whole numbers, too, so sums are exact.
//
//   x [T, K] -> q [T, K] whole, s [T]:  s = bound / 127,  q = round(x (127 / bound))
//   bound = 8 mean |x|, limited to the range from max |x| / 128 to max |x|; at least 2**-100
//   out = s sum over groups g of ((sum of q w over g) - zero[g] (sum of q over g)) scale[g]
//         + bias + residual
//
// With this bound, nearly all numbers of a row have 8 bits. The few outliers have up to 15 bits and a sign. A
// larger bound, which includes them, would make the steps of all other numbers coarse.
//
// Groups are added in ascending order, each by a multiplication and an addition. This file is compiled
// without contraction, so that every instruction set rounds in the same way. A scale for each row, and
// separate outliers, are from Dettmers et al., arXiv 2208.07339. A row with NaN or an infinity is NaN.
//
// With few rows, the time is that of reading W, one byte or half a byte for each element. Tiles of rows go
// through a group of panels while it is in cache, and fetch those of the next group (int_tile.h).
#include "linear_quantized.h"

#include "int_vec.h"
#include "integers.h"
#include "linear_finish.h"
#include "logit_fold.h"
#include "row_tiles.h"
#include "vec_row.h"

TTS_BEGIN_ISA

namespace {

constexpr int64_t kBlockBytes = 1 << 20;  // rows of a block stay in L2 while panels are read
constexpr float kSmallest = 0x1p-100f;    // keeps the scale and its inverse in the normal range
constexpr float kUsual = 8.0f;            // 8 bits cover this many times the mean magnitude
constexpr float kSmaller = 0x1p-17f;      // scales 2**16 magnitudes so that their sum fits in float32

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

RowTiles row_tiles(const LinearQuantizedArgs& args) { return {args.rows, args.cut.tiles, kIntUnit}; }

int64_t tile_of(const RowTiles& tiles, int64_t row) {
    int64_t tile = row * tiles.count / tiles.rows;
    while (tiles.begin(tile) > row) --tile;
    while (tiles.begin(tile + 1) <= row) ++tile;
    return tile;
}

// The value of a row's largest 8-bit number; NaN if the row has a NaN or an infinity.
struct Bound {
    float bound, largest;  // and the largest magnitude of the row
};

// The mean is a sum in 16 lanes for every instruction set, scaled so that it cannot overflow.
template <class T>
Bound bound_of(const T* x, int64_t depth) {
    constexpr int kLanes = 16, kVecs = kLanes / Vec::width;
    Vec top = Vec::zero(), spoilt = Vec::zero(), sums[kVecs];
    for (Vec& sum : sums) sum = Vec::zero();
    const auto take = [&](Vec v, Vec& sum) {
        const Vec size = max(v, Vec::zero() - v);
        top = max(size, top);
        spoilt = spoilt + v * Vec::zero();
        sum = sum + size * Vec::all(kSmaller);
    };
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
        for (int v = 0; v < kVecs; ++v) take(Vec::load(x + k + v * Vec::width), sums[v]);
    }
    for_vectors(depth - k, [&](int64_t j, int n) { take(load(x + k + j, n), sums[j / Vec::width]); });
    float lanes[kLanes];
    for (int v = 0; v < kVecs; ++v) sums[v].store(lanes + v * Vec::width);
    for (int half = kLanes / 2; half; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    const float largest = reduce_max(top) + reduce_add(spoilt), least = largest / kIntOutlier;
    const float usual = lanes[0] * (kUsual / kSmaller / static_cast<float>(depth));
    const float bound = usual < least ? least : usual < largest ? usual : largest;
    return {bound < kSmallest ? kSmallest : bound, largest};
}

// Appends the four elements at `step` if one of their high parts is not 0.
void append_outlier(const int8_t* high, int64_t step, Outlier* list, int32_t& count) {
    int32_t word;
    __builtin_memcpy(&word, high, sizeof word);
    list[count] = {static_cast<int32_t>(step), word};
    count += word != 0;
}

// Adds the sum of kIntGroup whole numbers to `lanes`.
template <class I>
void add_lanes(const I* numbers, IntVec& lanes) {
    for (int64_t j = 0; j < kIntGroup; j += Vec::width) lanes = lanes + IntVec::load(numbers + j);
}

// Row i of a tile of `height` rows.
template <class T>
void quantize_row(const LinearQuantizedArgs& args, const T* x, int64_t row, int64_t i, int64_t height,
                  int8_t* tile) {
    const QuantizedWeight& weight = args.weight;
    const auto [bound, largest] = bound_of(x, args.depth);
    const bool finite = !is_nan(bound);
    args.scales[row] = bound / kIntTop;
    const Vec inverse = Vec::all(kIntTop / bound);
    // Ties are rounded to even, so 127.5 is the smallest magnitude that does not fit in 8 bits.
    const bool split_row = kIntSplit && finite && largest * (kIntTop / bound) >= kIntTop + 0.5f;
    Outlier* outliers = args.outliers + row * args.cut.outliers;
    int32_t* starts = args.starts + row * (weight.groups + 1);
    int32_t count = starts[0] = 0;
    IntVec total = IntVec::all(0);
    int64_t g = 0, end = weight.group;  // of the group
    for (int64_t k = 0; k < weight.depth; k += kIntBlock) {
        alignas(64) int16_t block[kIntBlock] = {};
        alignas(64) IntNumber low[kIntBlock] = {};
        alignas(64) int8_t high[kIntBlock];
        const auto round_to = [&](auto* out) {
            const auto round = [&](int64_t j, int n) {
                store_rounded(load(x + k + j, n) * inverse, out + j);
            };
            k + kIntBlock <= args.depth ? for_vectors(kIntBlock, round) : for_vectors(args.depth - k, round);
        };
        if (split_row) {
            round_to(block);
        } else if (finite) {
            round_to(low);
        }
        const bool any = split_row && split(block, low, high);
        put_block(low, k, i, height, weight.depth, tile);
        for (int64_t half = 0; half < kIntBlock; half += kIntGroup) {
            any ? add_lanes(block + half, total) : add_lanes(low + half, total);
            for (int64_t j = half; any && j < half + kIntGroup; j += kIntStep) {
                append_outlier(high + j, (k + j) / kIntStep, outliers, count);
            }
            const int64_t at = k + half + kIntGroup;
            if (at < end && at < weight.depth) continue;
            args.totals[row * weight.groups + g] = total.sum();
            total = IntVec::all(0);
            end += weight.group;
            starts[++g] = count;
        }
    }
    if (weight.depth == 0) args.totals[row] = starts[1] = 0;  // one group, which is empty
}

// Whether rows of a tile have outliers in any group.
inline bool have_outliers(const LinearQuantizedArgs& args, int64_t row, int64_t height) {
    const int64_t groups = args.weight.groups;
    int32_t any = 0;
    for (int64_t i = row; kIntSplit && i < row + height; ++i) any |= args.starts[i * (groups + 1) + groups];
    return any != 0;
}

// sums [R][P][16] = the products of the rows' outliers in a group; false if there are none.
template <int Bits, int P>
bool outliers_of(const LinearQuantizedArgs& args, int64_t row, int64_t height, const uint8_t* data,
                 int64_t panel, int64_t g, int32_t* sums) {
    const int64_t stride = args.weight.groups + 1;
    const int32_t* starts = args.starts + row * stride + g;
    bool any = false;
    for (int64_t i = 0; i < height; ++i) any |= starts[i * stride] != starts[i * stride + 1];
    if (!any) return false;
    for (int64_t i = 0; i < height; ++i, starts += stride) {
        const Outlier* of_row = args.outliers + (row + i) * args.cut.outliers;
        sum_outliers<Bits, P>(of_row + starts[0], of_row + starts[1], data, panel, sums + i * P * kIntPanel);
    }
    return true;
}

// Finishes a tile's sums in a group: adds (sums - zero * total) * scale to float32 sums [R][P][16].
template <int Bits, int P>
struct GroupSums {
    const int32_t* totals;  // of the rows, `groups` apart
    int64_t groups;
    const float *scale, *zero;  // of the panels, `apart` floats apart; no zero: null
    int64_t apart;
    const int32_t* outliers;  // [R][P][16] to be added to the sums, or null
    float* acc;

    void operator()(int64_t i, int64_t p, PanelSums sums) const {
        const int64_t at = (i * P + p) * kIntPanel;
        const int32_t total = totals[i * groups];
        if (outliers) sums = sums + PanelSums::load(outliers + at);
        for (int v = 0; v < PanelSums::count; ++v) {
            const int64_t column = p * apart + v * Vec::width;
            float* to = acc + at + v * Vec::width;
            Vec sum = (sums.v[v] - IntVec::all(kIntAbove<Bits> * total)).to_float();
            if (zero) sum = sum - Vec::load(zero + column) * Vec::all(static_cast<float>(total));
            (Vec::load(to) + sum * Vec::load(scale + column)).store(to);
        }
    }
};

// The number of the current row tile among those that read the same panels. Each fetches its share of the
// panels that come `ahead` panels later.
struct Pass {
    int64_t number, count, ahead;
};

// Multiplies a row tile with P panels from `panel` on. If fewer are left, P becomes 1. At the end use(acc,
// stride, panels) gets the tile's [height] rows of sums, for so many panels.
template <int Bits, int R, int P, class F>
void run_tile(const LinearQuantizedArgs& args, int64_t row, int64_t height, int64_t panel, bool alone,
              Pass pass, F use) {
    const QuantizedWeight& weight = args.weight;
    const int64_t apart = alone ? 0 : 1, bytes = weight.depth / kIntStep * kIntLine<Bits>;
    const int8_t* rows = args.packed + row * args.cut.row_bytes;
    const int64_t next = panel + pass.ahead, steps = weight.depth / kIntStep;
    const bool fetch = pass.count * R > kFewRows && next + P <= args.cut.panels;
    const Ahead ahead = Ahead::share(weight.data + (fetch ? next : 0) * bytes, fetch ? P * kIntLine<Bits> : 0,
                                     steps, pass.number, pass.count);
    const bool split = have_outliers(args, row, height);
    alignas(64) float acc[R * P * kIntPanel];
    alignas(64) int32_t outliers[kIntSplit ? R * P * kIntPanel : 1];
    for (int64_t i = 0; i < height * P * kIntPanel; ++i) acc[i] = 0.0f;
    for (int64_t g = 0; g < weight.groups; ++g) {
        const int64_t begin = g * weight.group, end = least(begin + weight.group, weight.depth);
        const int64_t at = (panel * weight.groups + g) * kIntPanel;
        const uint8_t* data = weight.data + panel * bytes;
        const bool some = split && outliers_of<Bits, P>(args, row, height, data, apart * bytes, g, outliers);
        int_tile<Bits, R, P>(
            rows, height, weight.depth, data, apart * bytes, begin, end, ahead,
            GroupSums<Bits, P>{args.totals + row * weight.groups + g, weight.groups, weight.scale + at,
                               weight.zero ? weight.zero + at : nullptr, apart * weight.groups * kIntPanel,
                               some ? outliers : nullptr, acc});
    }
    use(acc, P * kIntPanel, panel, alone ? 1 : P);
}

// Processes panels [begin, end) for a row tile. Its height, in whole units, becomes a compile-time constant.
template <int Bits, int R = kIntRows, class F>
void run_panels(const LinearQuantizedArgs& args, int64_t row, int64_t height, int64_t begin, int64_t end,
                Pass pass, F use) {
    if constexpr (R > 0) {
        if (height <= R - kIntUnit) {
            return run_panels<Bits, R - kIntUnit>(args, row, height, begin, end, pass, use);
        }
        constexpr int P = int_panels<Bits>(R);
        int64_t panel = begin;
        for (; panel + P <= end; panel += P) run_tile<Bits, R, P>(args, row, height, panel, false, pass, use);
        for (; panel < end; ++panel) run_tile<Bits, R, P>(args, row, height, panel, true, pass, use);
    }
}

template <int Bits>
void run_unit(const LinearQuantizedArgs& args, int64_t unit) {
    const QuantizedCut& cut = args.cut;
    const RowTiles tiles = row_tiles(args);
    const int64_t groups = divide_up(cut.panels, cut.group);
    const int64_t first = unit / groups * cut.block, last = least(first + cut.block, cut.tiles);
    const int64_t panel = unit % groups * cut.group, end = least(panel + cut.group, cut.panels);
    for (int64_t t = first; t < last; ++t) {
        const int64_t row = tiles.begin(t), height = tiles.height(t);
        const auto finish = [&](const float* acc, int64_t stride, int64_t at, int64_t panels) {
            dispatch(args.x.dtype, [&]<class T>(T*) {
                finish_linear<T>(args, acc, stride, args.scales, row, height, at * kIntPanel,
                                 panels * kIntPanel);
            });
        };
        run_panels<Bits>(args, row, height, panel, end, {t - first, last - first, args.ahead}, finish);
    }
}

// A row's logits are folded in blocks of this many panels, for any tile width.
constexpr int64_t kLogitPanels = 4, kLogits = kLogitPanels * kIntPanel;

// The logits of `count` outputs from panel `begin` on, folded into the states of a row tile.
template <int Bits>
void fold_block(const QuantizedLogprobArgs& args, int64_t row, int64_t height, int64_t begin, int64_t count,
                Pass pass, float* max_state, float* sum_state) {
    const float* scales = args.linear.scales + row;
    alignas(64) float logits[kIntRows * kLogits];
    const auto keep = [&](const float* acc, int64_t stride, int64_t panel, int64_t panels) {
        for (int64_t i = 0; i < height; ++i) {
            float* to = logits + i * kLogits + (panel - begin) * kIntPanel;
            for (int64_t c = 0; c < panels * kIntPanel; c += Vec::width) {
                (Vec::load(acc + i * stride + c) * Vec::all(scales[i])).store(to + c);
            }
        }
    };
    run_panels<Bits>(args.linear, row, height, begin, begin + divide_up(count, kIntPanel), pass, keep);
    for (int64_t i = 0; i < height; ++i) {
        const float* of_row = logits + i * kLogits;
        fold_logits<kLogits>(of_row, static_cast<int>(count), args.inv_temperature, max_state[row + i],
                             sum_state[row + i]);
        const int64_t t = at(args.targets, row + i) - begin * kIntPanel;
        if (t >= 0 && t < count) args.target[row + i] = of_row[t] * args.inv_temperature;
    }
}

template <int Bits>
void logprob_chunk(const QuantizedLogprobArgs& args, int64_t chunk) {
    static_assert(kVocabularyChunk % kIntPanel == 0);
    const RowTiles tiles = row_tiles(args.linear);
    const int64_t first = chunk * kVocabularyChunk;
    const int64_t last = least(first + kVocabularyChunk, args.linear.columns);
    float* max_state = args.max + chunk * args.linear.rows;
    float* sum_state = args.sum + chunk * args.linear.rows;
    for (int64_t r = 0; r < args.linear.rows; ++r) {
        max_state[r] = -kInfinity;
        sum_state[r] = 0.0f;
    }
    for (int64_t output = first; output < last; output += kLogits) {
        const int64_t count = least(kLogits, last - output);
        for (int64_t t = 0; t < tiles.count; ++t) {
            fold_block<Bits>(args, tiles.begin(t), tiles.height(t), output / kIntPanel, count,
                             {t, tiles.count, kLogitPanels}, max_state, sum_state);
        }
    }
}

}  // namespace

QuantizedCut linear_quantized_cut(int64_t rows, int64_t columns, int64_t depth) {
    const int64_t tiles = divide_up(rows, kIntRows), panels = divide_up(columns, kIntPanel);
    // For few rows long streams; for more rows, units that are small enough for all threads to end together.
    const int64_t group = kIntUnit > 1 || rows <= kFewRows ? 4 : 2, row_bytes = int_row_bytes(depth);
    const int64_t fit = kBlockBytes / (kIntRows * row_bytes + 1);
    const int64_t block = least(tiles, fit < 1 ? 1 : fit);
    const int64_t units = tiles ? divide_up(tiles, block) * divide_up(panels, group) : 0;
    const int64_t outliers = kIntSplit ? depth / kIntStep + 1 : 0;  // and one that is overwritten
    return {tiles, block, panels, group, units, row_bytes, round_up(rows, kIntUnit), outliers};
}

void linear_quantize_x(const LinearQuantizedArgs& args, int64_t begin, int64_t end) {
    const RowTiles tiles = row_tiles(args);
    dispatch(args.x.dtype, [&]<class T>(T*) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t tile = tile_of(tiles, row), first = tiles.begin(tile);
            const T* x = static_cast<const T*>(args.x.data) + row * args.x_stride;
            quantize_row(args, x, row, row - first, tiles.height(tile),
                         args.packed + first * args.cut.row_bytes);
        }
    });
}

void linear_quantized(const LinearQuantizedArgs& args, int64_t begin, int64_t end) {
    const IntTiles state(args.weight.group);
    for (int64_t unit = begin; unit < end; ++unit) {
        args.weight.bits == 8 ? run_unit<8>(args, unit) : run_unit<4>(args, unit);
    }
}

void linear_logprob_quantized(const QuantizedLogprobArgs& args, int64_t begin, int64_t end) {
    const IntTiles state(args.linear.weight.group);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        args.linear.weight.bits == 8 ? logprob_chunk<8>(args, chunk) : logprob_chunk<4>(args, chunk);
    }
}

TTS_END_ISA
