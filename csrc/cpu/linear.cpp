// linear: out = x W^T + bias + residual, for weights that were packed once, optimised for few rows.
//
//   x [T, K], W [N, K] packed into panels of 16 rows  ->  out [T, N]
//
// For up to about 10 rows, the time is that of reading W. So W is stored in the order in which a tile reads
// it: each panel is one stream of whole cache lines, without gathers or conversions of layout. The rows of x
// are packed in the tile's order for each call (a few percent of the work). Then the inner loop needs no
// strides: one load for each panel and one multiply-add for each row. With more rows, several tiles go
// through the same panels one after another, and meanwhile fetch the next panels into L2, so that arithmetic
// does not wait for memory. Work is cut into groups of panels x blocks of about 256 rows. One thread computes
// a sum from start to end (float_tile.h), so results depend neither on threads nor on the number of rows.
#include "linear.h"

#include "integers.h"
#include "linear_finish.h"
#include "row_tiles.h"

TTS_BEGIN_ISA

namespace {

constexpr int64_t kBlockRows = 256;  // packed rows of a block stay in L2 while panels are read
constexpr int64_t kFewGroup = 4;     // long streams: one panel after another

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
void pack_panel(const PackLinearArgs& args, int64_t panel) {
    constexpr int S = kStep<T>;
    const auto* weight = static_cast<const T*>(args.weight.data);
    const int64_t steps = divide_up(args.depth, S);
    T* out = static_cast<T*>(args.out) + panel * steps * kPanel * S;
    for (int64_t s = 0; s < steps; ++s) {
        for (int64_t c = 0; c < kPanel; ++c) {
            const int64_t n = panel * kPanel + c;
            for (int64_t j = 0; j < S; ++j) {
                const int64_t k = s * S + j;
                const bool inside = n < args.columns && k < args.depth;
                out[(s * kPanel + c) * S + j] = inside ? weight[n * args.stride + k] : T{};
            }
        }
    }
}

// One pass of a row tile through panels [begin, end), P at a time. If fewer are left, P becomes 1. Pass
// number `pass` of `passes` fetches its share of the panels that the thread will process next.
template <class T, int R, int P>
void run_tile(const LinearArgs& args, int64_t row, int64_t begin, int64_t end, int64_t pass, int64_t passes) {
    constexpr int64_t kLine = kPanel * kStep<T> * sizeof(T);  // bytes of a panel's step
    const int64_t steps = divide_up(args.depth, kStep<T>), panel = steps * kPanel * kStep<T>;
    const float* rows = args.packed + row * packed_row<T>(steps);
    const auto* weight = static_cast<const T*>(args.weight);
    const int64_t next = begin + args.ahead;
    const bool fetch = passes * R > kFewRows && next + P <= args.cut.panels;
    const T* from = weight + (fetch ? next : 0) * panel;
    const Ahead ahead = Ahead::share(from, fetch ? P * kLine : 0, steps, pass, passes);
    alignas(64) float sums[R * P * kPanel];
    for (int64_t width; begin < end; begin += width) {
        width = begin + P <= end ? P : 1;
        float_tile<T, R, P>(rows, weight + begin * panel, width == P ? panel : 0, steps, ahead, sums);
        finish_linear<T>(args, sums, P * kPanel, /* scales */ nullptr, row, R, begin * kPanel,
                         width * kPanel);
    }
}

// All tiles of a product share the panels of their group, even if one that is one row lower would prefer
// others.
template <class T, int R = kFloatRows>
void run_tile_of(int64_t height, const LinearArgs& args, int64_t row, int64_t begin, int64_t end,
                 int64_t pass, int64_t passes) {
    if constexpr (R > 0) {
        if (height != R) return run_tile_of<T, R - 1>(height, args, row, begin, end, pass, passes);
        constexpr int P = float_panels(R), Q = float_panels(R + 1);
        args.cut.at_once == P ? run_tile<T, R, P>(args, row, begin, end, pass, passes)
                              : run_tile<T, R, Q>(args, row, begin, end, pass, passes);
    }
}

}  // namespace

void linear_pack_weight(const PackLinearArgs& args, int64_t begin, int64_t end) {
    dispatch(args.weight.dtype, [&]<class T>(T*) {
        for (int64_t panel = begin; panel < end; ++panel) pack_panel<T>(args, panel);
    });
}

LinearCut linear_cut(int64_t rows, int64_t columns, int64_t depth, DType dtype) {
    const int64_t tiles = divide_up(rows, kFloatRows), panels = divide_up(columns, kPanel);
    const int64_t at_once = float_panels(static_cast<int>(tiles ? divide_up(rows, tiles) : 1));
    const int64_t group = rows <= kFewRows ? kFewGroup : at_once;
    const int64_t block = min(tiles, kBlockRows / kFloatRows);
    const int64_t row =
        dispatch(dtype, [&]<class T>(T*) { return packed_row<T>(divide_up(depth, kStep<T>)); });
    const int64_t units = tiles ? divide_up(tiles, block) * divide_up(panels, group) : 0;
    return {tiles, block, panels, group, at_once, units, row, rows * row};
}

void linear_pack_x(const LinearArgs& args, int64_t begin, int64_t end) {
    const RowTiles tiles{args.rows, args.cut.tiles};
    dispatch(args.x.dtype, [&]<class T>(T*) {
        const int64_t steps = divide_up(args.depth, kStep<T>);
        for (int64_t t = begin; t < end; ++t) {
            const T* x = static_cast<const T*>(args.x.data) + tiles.begin(t) * args.x_stride;
            float* out = args.packed + tiles.begin(t) * args.cut.row;
            pack_rows(x, args.x_stride, tiles.height(t), args.depth, steps, out);
        }
    });
}

void linear(const LinearArgs& args, int64_t begin, int64_t end) {
    const LinearCut& cut = args.cut;
    const RowTiles tiles{args.rows, cut.tiles};
    const int64_t groups = divide_up(cut.panels, cut.group);
    dispatch(args.x.dtype, [&]<class T>(T*) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t first = unit / groups * cut.block, last = min(first + cut.block, cut.tiles);
            const int64_t panel = unit % groups * cut.group, end = min(panel + cut.group, cut.panels);
            for (int64_t t = first; t < last; ++t) {
                run_tile_of<T>(tiles.height(t), args, tiles.begin(t), panel, end, t - first, last - first);
            }
        }
    });
}

TTS_END_ISA
