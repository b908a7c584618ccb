// linear in bfloat16 with AMX tiles; for float32 and float16 the kernel of AVX-512 is used.
//
// The panels of a packed weight are tiles without any change. A tile of sums is one chain over at most 2048
// elements of the depth, 32 at a time in the order of the instruction, regardless of the other rows. Rows of
// x are first copied into tiles [16 rows][32 elements], with zeros after the depth and in missing rows of the
// last tile. `tdpbf16ps` treats subnormal numbers as zero.
#include "amx_tiles.h"
#include "integers.h"
#include "linear.h"
#include "linear_finish.h"
#include "row_tiles.h"

namespace tts {
namespace avx512 {

extern decltype(TTS_ISA::linear_cut) linear_cut;
extern decltype(TTS_ISA::linear_pack_x) linear_pack_x;
extern decltype(TTS_ISA::linear) linear;

}  // namespace avx512
}  // namespace tts

TTS_BEGIN_ISA

namespace {

constexpr int64_t kRows = 32, kTileDepth = 32, kTileSteps = kTileDepth / 2;
constexpr int64_t kChainTiles = kChain<bf16> / kTileSteps;
constexpr int64_t kBlockBytes = 1 << 20;  // rows of a block stay in L2 while panels are read
constexpr int64_t kGroup = 4;             // panels in a unit
constexpr int64_t kAhead = 8;             // tiles of weights that are prefetched

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t tiles_of(int64_t depth) { return divide_up(depth, kTileDepth); }

// The weights of a panel's tile. If the tile is longer than the depth, they are copied to `room` with zeros
// after it.
const void* weights_of(const LinearArgs& args, int64_t panel, int64_t tile, void* room) {
    const int64_t steps = divide_up(args.depth, 2);
    const auto* line =
        static_cast<const char*>(args.weight) + (panel * steps + tile * kTileSteps) * kTileLine;
    for (int64_t i = 0; i < kTileBytes; i += kTileLine)
        __builtin_prefetch(line + kAhead * kTileBytes + i, 0, 2);
    const int64_t left = steps - tile * kTileSteps;
    if (left >= kTileSteps) return line;
    fence();
    for (int64_t s = 0; s < kTileSteps; ++s) {
        const __m512i value = s < left ? _mm512_loadu_si512(line + s * kTileLine) : _mm512_setzero_si512();
        _mm512_store_si512(static_cast<char*>(room) + s * kTileLine, value);
    }
    fence();
    return room;
}

// Multiplies R rows with P panels from `panel` on. If fewer are left, P becomes 1.
template <int R>
void run_tile(const LinearArgs& args, int64_t row, int64_t height, int64_t panel, bool alone) {
    constexpr int64_t P = R == 16 ? 4 : 2;
    alignas(64) char room[kTileBytes];
    alignas(64) float sums[R * P * kPanel], part[R * P * kPanel];
    const auto* rows = reinterpret_cast<const char*>(args.packed + row * args.cut.row);
    const int64_t tiles = tiles_of(args.depth);
    for (int64_t begin = 0; begin < tiles || begin == 0; begin += kChainTiles) {
        zero_sums();
        for (int64_t t = begin; t < min(begin + kChainTiles, tiles); ++t) {
            add_products<BFloat16Product, R>(rows + t * kTileBytes, tiles * kTileBytes, [&](int64_t p) {
                return weights_of(args, alone ? panel : panel + p, t, room);
            });
        }
        store_sums<R>(begin ? part : sums);
        if (begin) {
            for (int64_t i = 0; i < height * P * kPanel; i += Vec::width) {
                (Vec::load(sums + i) + Vec::load(part + i)).store(sums + i);
            }
        }
    }
    finish_linear<bf16>(args, sums, P * kPanel, /* scales */ nullptr, row, height, panel * kPanel,
                        (alone ? 1 : P) * kPanel);
}

template <int R>
void run_panels(const LinearArgs& args, int64_t row, int64_t height, int64_t begin, int64_t end) {
    constexpr int64_t P = R == 16 ? 4 : 2;
    for (; begin + P <= end; begin += P) run_tile<R>(args, row, height, begin, false);
    for (; begin < end; ++begin) run_tile<R>(args, row, height, begin, true);
}

}  // namespace

LinearCut linear_cut(int64_t rows, int64_t columns, int64_t depth, DType dtype) {
    if (dtype != DType::bf16) return avx512::linear_cut(rows, columns, depth, dtype);
    const int64_t tiles = divide_up(rows, kRows), panels = divide_up(columns, kPanel);
    const int64_t row = tiles_of(depth) * kTileLine / 4, fit = kBlockBytes / (kRows * row * 4 + 1);
    const int64_t block = min(tiles, fit < 1 ? 1 : fit);
    const int64_t units = tiles ? divide_up(tiles, block) * divide_up(panels, kGroup) : 0;
    return {tiles, block, panels, kGroup, kGroup, units, row, round_up(rows, kTileLines) * row};
}

void linear_pack_x(const LinearArgs& args, int64_t begin, int64_t end) {
    if (args.x.dtype != DType::bf16) return avx512::linear_pack_x(args, begin, end);
    const RowTiles tiles{args.rows, args.cut.tiles, kTileLines};
    const int64_t count = tiles_of(args.depth);
    for (int64_t row = tiles.begin(begin); row < tiles.begin(end); ++row) {
        const bf16* x = static_cast<const bf16*>(args.x.data) + row * args.x_stride;
        auto* out = reinterpret_cast<char*>(args.packed + row / kTileLines * kTileLines * args.cut.row) +
                    row % kTileLines * kTileLine;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t left = args.depth - t * kTileDepth;
            const __mmask32 mask = left < kTileDepth ? (1u << left) - 1u : ~0u;
            _mm512_storeu_si512(out + t * kTileBytes, _mm512_maskz_loadu_epi16(mask, x + t * kTileDepth));
        }
    }
}

void linear(const LinearArgs& args, int64_t begin, int64_t end) {
    if (args.x.dtype != DType::bf16) return avx512::linear(args, begin, end);
    const AmxTiles state(kTileSteps);
    const LinearCut& cut = args.cut;
    const RowTiles tiles{args.rows, cut.tiles, kTileLines};
    const int64_t groups = divide_up(cut.panels, cut.group);
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit / groups * cut.block, last = min(first + cut.block, cut.tiles);
        const int64_t panel = unit % groups * cut.group, end_panel = min(panel + cut.group, cut.panels);
        for (int64_t t = first; t < last; ++t) {
            const int64_t row = tiles.begin(t), height = tiles.height(t);
            height <= kTileLines ? run_panels<16>(args, row, height, panel, end_panel)
                                 : run_panels<32>(args, row, height, panel, end_panel);
        }
    }
}

TTS_END_ISA
