// linear on weights of 8 or 4 bits: rows of x become whole numbers of 8 bits too, so sums are exact.
//
//   x [T, K] -> q [T, K] int8, s [T]:  s = max(|x|, 2**-100) / 127,  q = round(x (127 / max(|x|, 2**-100)))
//   out = s sum over groups g of ((sum of q w over g) - zero[g] (sum of q over g)) scale[g]  + bias +
//   residual
//
// Groups are added in ascending order, each by a multiplication and an addition: this file is compiled
// without contraction, so that every instruction set rounds alike. Per-row activation scales: Dettmers et
// al., arXiv 2208.07339. A row with NaN or an infinity is NaN.
//
// Few rows are bound by reading W, a byte or half of one per element; a tile of rows passes a group of panels
// while they are in cache (int_tile.h).
#include "linear_quantized.h"

#include "int_vec.h"
#include "integers.h"
#include "linear_finish.h"
#include "logit_fold.h"
#include "row_tiles.h"
#include "vec_row.h"

TTS_BEGIN_ISA

namespace {

constexpr int64_t kBlockBytes = 1 << 20;  // rows of a block stay in L2 while the panels pass
constexpr float kSmallest = 0x1p-100f;    // so that neither the scale nor its inverse leaves the normal range

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

RowTiles row_tiles(const LinearQuantizedArgs& args) { return {args.rows, args.cut.tiles, kIntUnit}; }

int64_t tile_of(const RowTiles& tiles, int64_t row) {
    int64_t tile = row * tiles.count / tiles.rows;
    while (tiles.begin(tile) > row) --tile;
    while (tiles.begin(tile + 1) <= row) ++tile;
    return tile;
}

// The largest magnitude of a row; NaN if the row has a NaN or an infinity.
template <class T>
float magnitude(const T* x, int64_t depth) {
    Vec top = Vec::zero(), spoilt = Vec::zero();
    for_vectors(depth, [&](int64_t k, int n) {
        const Vec v = load(x + k, n);
        top = max(max(v, Vec::zero() - v), top);
        spoilt = spoilt + v * Vec::zero();
    });
    return reduce_max(top) + reduce_add(spoilt);
}

// Row i of a tile of `height` rows.
template <class T>
void quantize_row(const LinearQuantizedArgs& args, const T* x, int64_t row, int64_t i, int64_t height,
                  int8_t* tile) {
    const QuantizedWeight& weight = args.weight;
    const float top = magnitude(x, args.depth), bound = top > kSmallest ? top : kSmallest;
    const bool finite = !is_nan(top);
    args.scales[row] = finite ? bound / 127.0f : top;
    const Vec inverse = Vec::all(127.0f / bound);
    int32_t* totals = args.totals + row * weight.groups;
    for (int64_t g = 0; g < weight.groups; ++g) totals[g] = 0;
    for (int64_t k = 0; k < weight.depth; k += kIntBlock) {
        alignas(64) int8_t block[kIntBlock] = {};
        if (finite) {
            for_vectors(least(kIntBlock, args.depth - k),
                        [&](int64_t j, int n) { store_rounded(load(x + k + j, n) * inverse, block + j); });
        }
        put_block(block, k, i, height, weight.depth, tile);
        for (int64_t half = 0; half < kIntBlock; half += kIntGroup) {
            int32_t total = 0;
            for (int64_t j = half; j < half + kIntGroup; ++j) total += block[j];
            totals[(k + half) / weight.group] += total;
        }
    }
}

// acc += (sums - zero * totals) * scale, for a tile's rows.
template <int P>
void add_group(const LinearQuantizedArgs& args, const int32_t* sums, int64_t row, int64_t height,
               int64_t panel, int64_t apart, int64_t g, float* acc) {
    const QuantizedWeight& weight = args.weight;
    const int32_t above = 1 << (weight.bits - 1);
    for (int64_t i = 0; i < height; ++i) {
        const int32_t total = args.totals[(row + i) * weight.groups + g];
        for (int p = 0; p < P; ++p) {
            const int64_t at = ((panel + p * apart) * weight.groups + g) * kIntPanel;
            for (int64_t c = 0; c < kIntPanel; c += Vec::width) {
                const int64_t to = (i * P + p) * kIntPanel + c;
                Vec sum = load_less(sums + to, above * total);
                if (weight.zero) {
                    sum = sum - Vec::load(weight.zero + at + c) * Vec::all(static_cast<float>(total));
                }
                (Vec::load(acc + to) + sum * Vec::load(weight.scale + at + c)).store(acc + to);
            }
        }
    }
}

// A row tile through P panels from `panel` on, or through that one alone, P times (no panel apart). At the
// end use(acc, stride, panels) gets the tile's [height] rows of sums, that many panels wide.
template <int Bits, int R, int P, class F>
void run_tile(const LinearQuantizedArgs& args, int64_t row, int64_t height, int64_t panel, bool alone,
              F use) {
    const QuantizedWeight& weight = args.weight;
    const int64_t apart = alone ? 0 : 1, bytes = weight.depth / kIntStep * kIntLine<Bits>;
    const int8_t* rows = args.packed + row * args.cut.row_bytes;
    alignas(64) float acc[R * P * kIntPanel];
    alignas(64) int32_t sums[R * P * kIntPanel];
    for (int64_t i = 0; i < height * P * kIntPanel; ++i) acc[i] = 0.0f;
    for (int64_t g = 0; g < weight.groups; ++g) {
        const int64_t begin = g * weight.group, end = least(begin + weight.group, weight.depth);
        const uint8_t* data = weight.data + panel * bytes;
        int_tile<Bits, R, P>(rows, weight.depth, data, apart * bytes, begin, end, sums);
        add_group<P>(args, sums, row, height, panel, apart, g, acc);
    }
    use(acc, P * kIntPanel, panel, alone ? 1 : P);
}

// Panels [begin, end) for a row tile, whose height becomes a constant: whole units of it.
template <int Bits, int R = kIntRows, class F>
void run_panels(const LinearQuantizedArgs& args, int64_t row, int64_t height, int64_t begin, int64_t end,
                F use) {
    if constexpr (R > 0) {
        if (height <= R - kIntUnit) {
            return run_panels<Bits, R - kIntUnit>(args, row, height, begin, end, use);
        }
        constexpr int P = int_panels(R);
        int64_t panel = begin;
        for (; panel + P <= end; panel += P) run_tile<Bits, R, P>(args, row, height, panel, false, use);
        for (; panel < end; ++panel) run_tile<Bits, R, P>(args, row, height, panel, true, use);
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
        run_panels<Bits>(args, row, height, panel, end, finish);
    }
}

// A row's logits are folded in blocks of as many panels, however many a tile has.
constexpr int64_t kLogitPanels = 4, kLogits = kLogitPanels * kIntPanel;

// The logits of `count` outputs from panel `begin` on, folded into the states of a row tile.
template <int Bits>
void fold_block(const QuantizedLogprobArgs& args, int64_t row, int64_t height, int64_t begin, int64_t count,
                float* max_state, float* sum_state) {
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
    run_panels<Bits>(args.linear, row, height, begin, begin + divide_up(count, kIntPanel), keep);
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
            fold_block<Bits>(args, tiles.begin(t), tiles.height(t), output / kIntPanel, count, max_state,
                             sum_state);
        }
    }
}

}  // namespace

QuantizedCut linear_quantized_cut(int64_t rows, int64_t columns, int64_t depth) {
    const int64_t tiles = divide_up(rows, kIntRows), panels = divide_up(columns, kIntPanel);
    const int64_t group = 4, row_bytes = int_row_bytes(depth);
    const int64_t fit = kBlockBytes / (kIntRows * row_bytes + 1);
    const int64_t block = least(tiles, fit < 1 ? 1 : fit);
    const int64_t units = tiles ? divide_up(tiles, block) * divide_up(panels, group) : 0;
    return {tiles, block, panels, group, units, row_bytes, round_up(rows, kIntUnit)};
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
