// tree_attention on tensor cores: bfloat16 and float16, head sizes up to 256, padded to 64, 96, 128 or 256.
//
// A block of four warps runs a task for one KV head, in tiles of lanes (query heads x rows that share keys):
//
//   S [16 lanes, keys] = Q K^T       Q in registers, K by ldmatrix                       m16n8k16
//   O [16 lanes, D]   += P V         P = exp2(S - max) from S's registers, V by ldmatrix.trans
//
// A warp has 16 lanes. In a wide tile (up to 64 lanes) each warp has other lanes and all keys; in a narrow
// one (16 lanes) the warps have the same lanes and split each block of keys, and are merged in shared memory
// at the end. (Where D is 256, two and two warps do, for 32 lanes.) A block of keys is 64 tokens (32 where D
// is 256): 2 x 64 x 128 x 2 bytes = 32 KB of K and V, copied by cp.async while the block before is
// multiplied; 68 KB for two, so two thread blocks share an SM of 164 KB and keep 64 KB of reads in flight.
// Rows of shared memory are 16 bytes longer than D, so that the eight rows of an ldmatrix fall on different
// banks.
//
// Hidden keys score -inf, and tokens that no row of the tile sees are zeros in shared memory. A token that
// only some of the rows see may hold infinities or NaN, and 0 * inf is NaN: such rows of V are found while
// they are in hand (only in blocks that some row sees in part), blanked in the fragments, and added to the
// lanes that do see them by plain arithmetic.
#pragma once

#include "mma.cuh"
#include "tree_attention_item.cuh"

namespace tts::cuda {

// A stretch of keys that is in shared memory at once. `start` is the position of its first token.
struct KeyBlock {
    int start, count = 0, row_begin, row_end;
    bool whole = true;  // every row of the tile sees all of it
};

// Goes through the key blocks that some row of a tile sees.
class KeyBlocks {
  public:
    __device__ KeyBlocks(const Item& item, int row_begin, int row_end)
        : item_(item), row_begin_(row_begin), row_end_(row_end), index_(item.task.seg_begin - 1) {}

    // To the first block, then on.
    template <int kKeys>
    __device__ void advance() {
        begin_ += kKeys;
        if (begin_ >= end_ && !done()) next_segment();
    }

    __device__ bool done() const { return index_ >= item_.task.seg_end; }
    __device__ const Segment& segment() const { return segment_; }
    __device__ int token() const { return begin_; }  // counted from the segment's start

    template <int kKeys>
    __device__ KeyBlock block() const {
        if (done()) return {};
        const int count = min(kKeys, end_ - begin_);
        return {segment_.start + begin_, count, segment_.row_begin, segment_.row_end,
                begin_ >= all_begin_ && begin_ + count <= all_end_};
    }

  private:
    __device__ void next_segment() {
        for (++index_; !done(); ++index_) {
            segment_ = item_.args.segments[index_];
            const View view(item_.args, segment_, row_begin_, row_end_);
            if (view.begin >= view.end) continue;
            begin_ = view.begin, end_ = view.end, all_begin_ = view.all_begin, all_end_ = view.all_end;
            return;
        }
    }

    const Item& item_;
    const int row_begin_, row_end_;
    int index_, begin_ = 0, end_ = 0, all_begin_ = 0, all_end_ = 0;
    Segment segment_{};
};

// Two elements as a fragment has them, the first in the lower half.
template <class T>
__device__ uint32_t pack_pair(float first, float second) {
    uint32_t pair;
    if constexpr (__is_same(T, bf16)) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    }
    return pair;
}

// Whether one of the two elements of a pair is infinite or NaN: all bits of its exponent are set.
template <class T>
__device__ bool has_nonfinite(uint32_t pair) {
    constexpr uint32_t kExponent = __is_same(T, bf16) ? 0x7f807f80u : 0x7c007c00u;
    constexpr uint32_t kLowest = __is_same(T, bf16) ? 0x00800080u : 0x04000400u;
    return ((pair & kExponent) + kLowest) & 0x80008000u;
}

template <int kDim>
struct MmaShape {
    static constexpr bool kLarge = kDim > 128;  // too many registers for Q and O: Q stays in shared memory
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
    static constexpr int kKeys = kLarge ? 32 : 64;
    static constexpr int kNarrowRowWarps = kLarge ? 2 : 1, kWideRowWarps = kLarge ? 2 : 4;
    static constexpr int kStride = kDim + 8;                // elements from row to row of Q, K and V
    static constexpr int kBlockElements = kKeys * kStride;  // elements of a block of K or V
    static constexpr int kStages = 2;                       // of K and V
    static constexpr int kQueries =
        (kLarge ? kStages : 1) * 2 * kBlockElements;  // where Q is: behind, or in the second
    static constexpr int kShared =
        2 * (kStages * 2 * kBlockElements + (kLarge ? 16 * kWideRowWarps * kStride : 0));
    static constexpr int kResultStride = kDim + 8;  // floats of a row of the result's stage, [16 * kWarps, D]
    static_assert(16 * kWarps * kResultStride * 4 <= kShared &&
                  16 * kWideRowWarps * kStride <= 2 * kBlockElements);
};

struct MmaShared {
    uint32_t nonfinite[2][4];  // [stage][warp]: bit r: row r of V that it copied has an infinity or a NaN
    float2 state[64];          // of the result's stage: max (log2), sum
};

// One tile of an item: lanes [first, first + 16 * kRowWarps), as far as there are any.
template <class T, int kDim, int kRowWarps>
class MmaTile {
    using Shape = MmaShape<kDim>;
    static constexpr int kKeys = Shape::kKeys, kStride = Shape::kStride,
                         kBlockElements = Shape::kBlockElements;
    static constexpr int kLanes = 16 * kRowWarps, kKeyWarps = Shape::kWarps / kRowWarps;
    static constexpr int kWarpKeys = kKeys / kKeyWarps;      // of a block, that a warp multiplies
    static constexpr int kCopyRows = kKeys / Shape::kWarps;  // of a block, that a warp copies
    static constexpr int kChunks = kDim / 8;                 // of 16 bytes a row
    static constexpr int kRowLanes = kChunks <= 8    ? 8
                                     : kChunks <= 16 ? 16
                                                     : 32,
                         kRowsAtOnce = kWarp / kRowLanes;
    static constexpr int kPasses = kCopyRows / kRowsAtOnce;
    static constexpr int kScoreTiles = kWarpKeys / 8, kOutTiles = kDim / 8, kSteps = kDim / 16;

  public:
    __device__ MmaTile(const TreeAttentionLaunch& launch, const Item& item, int first, uint16_t* stages,
                       MmaShared& shared)
        : launch_(launch),
          item_(item),
          first_(first),
          count_(min(kLanes, item.lanes() - first)),
          stages_(stages),
          shared_(shared),
          map_(launch.args) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int lane_of_tile = row_warp() * 16 + r * 8 + lane() / 4;
            row_[r] = lane_of_tile < count_ ? item.row(first + lane_of_tile) : -1;
            position_[r] = row_[r] < 0 ? 0 : launch.args.positions[row_[r]];
        }
    }

    // Each turn copies a block of keys and multiplies the one before; the first turn copies alone.
    __device__ void run() {
        KeyBlocks ahead(item_, item_.row(first_), item_.row(first_ + count_ - 1) + 1);
        step(ahead);
        copy_queries();
        KeyBlock block, next = ahead.block<kKeys>();
        for (int stage = 1; block.count + next.count > 0; stage ^= 1) {
            const bool first = block.count == 0;
            if (!first) receive(block, stage);
            if (next.count > 0) copy_keys(next, stage ^ 1);
            step(ahead);
            first ? load_queries() : multiply(block, stage);
            block = next;
            next = ahead.block<kKeys>();
        }
        write();
    }

  private:
    __device__ int row_warp() const { return warp() % kRowWarps; }
    __device__ int first_key() const { return warp() / kRowWarps * kWarpKeys; }
    __device__ T* keys(int stage) const { return reinterpret_cast<T*>(stages_) + stage * 2 * kBlockElements; }
    __device__ T* values(int stage) const { return keys(stage) + kBlockElements; }
    __device__ T* queries() const { return reinterpret_cast<T*>(stages_) + Shape::kQueries; }
    // A row of the warp's queries for load_matrices.
    __device__ const T* query_row() const {
        return queries() + (row_warp() * 16 + lane() % 16) * kStride + lane() / 16 * 8;
    }

    // ---- copies to shared memory
    // ------------------------------------------------------------------------------

    // 8 elements; zeros unless `take`.
    template <bool kAligned>
    __device__ static void copy(T* to, const T* from, bool take) {
        if constexpr (kAligned) {
            copy_async(to, from, take ? 16 : 0);
        } else {
            for (int i = 0; i < 8; ++i) to[i] = take ? from[i] : T{0};
        }
    }

    // The tile's queries, [kLanes, kDim].
    __device__ void copy_queries() const {
        for (int i = threadIdx.x; i < kLanes * kChunks; i += Shape::kThreads) {
            const int lane_of_tile = i / kChunks, d = i % kChunks * 8;
            const bool take = lane_of_tile < count_ && d < launch_.args.head_dim;
            const T* from = item_.template query<T>(first_ + (take ? lane_of_tile : 0)) + (take ? d : 0);
            T* to = queries() + lane_of_tile * kStride + d;
            launch_.aligned ? copy<true>(to, from, take) : copy<false>(to, from, take);
        }
        close_copies();
    }

    // On to the next block, and where its tokens lie: lane l looks up row l % kCopyRows of its warp's. The
    // pages are on their way while the block before is multiplied.
    __device__ void step(KeyBlocks& ahead) {
        ahead.advance<kKeys>();
        const int row = warp() * kCopyRows + lane() % kCopyRows;
        const KeyBlock block = ahead.block<kKeys>();
        if (row >= block.count) return;
        k_offset_ = item_.offset(launch_.args.k, ahead.segment(), ahead.token() + row);
        v_offset_ = item_.offset(launch_.args.v, ahead.segment(), ahead.token() + row);
    }

    // The block that `ahead` is at, into a stage.
    __device__ void copy_keys(const KeyBlock& block, int stage) const {
        if (launch_.aligned) {
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) copy_chunks<true>(block, stage, pass);
        } else {
#pragma unroll 1
            for (int pass = 0; pass < kPasses; ++pass) copy_chunks<false>(block, stage, pass);
        }
        close_copies();
    }

    // This lane's chunk of a pass over the rows of its warp, of K and of V.
    template <bool kAligned>
    __device__ void copy_chunks(const KeyBlock& block, int stage, int pass) const {
        const Chunk at(pass);
        const int64_t k_row = __shfl_sync(kAllLanes, k_offset_, at.row_of_warp),
                      v_row = __shfl_sync(kAllLanes, v_offset_, at.row_of_warp);
        if (!at.exists()) return;
        const bool take = at.row < block.count && at.d < launch_.args.head_dim;
        const int64_t k = take ? k_row + at.d : 0, v = take ? v_row + at.d : 0;
        copy<kAligned>(keys(stage) + at.index, static_cast<const T*>(launch_.args.k.data) + k, take);
        copy<kAligned>(values(stage) + at.index, static_cast<const T*>(launch_.args.v.data) + v, take);
    }

    // A pass copies kRowsAtOnce rows of the warp's; lanes that a row of 12 chunks leaves over do nothing.
    struct Chunk {
        int row_of_warp, row, d, index;  // index: in a stage's K or V

        __device__ explicit Chunk(int pass) {
            row_of_warp = pass * kRowsAtOnce + lane() / kRowLanes, row = warp() * kCopyRows + row_of_warp;
            d = lane() % kRowLanes * 8, index = row * kStride + d;
        }
        __device__ bool exists() const { return kRowLanes == kChunks || d < kDim; }
    };

    // Waits for a block.
    __device__ void receive(const KeyBlock& block, int stage) const {
        wait_copies<0>();
        if (!block.whole) find_nonfinite(stage);
        __syncthreads();
    }

    // Marks the rows of V, among those that this warp has copied, that have an infinity or a NaN.
    __device__ void find_nonfinite(int stage) const {
        uint32_t found = 0;
        for (int pass = 0; pass < kPasses; ++pass) {
            const Chunk at(pass);
            if (!at.exists()) continue;
            const uint4 x = *reinterpret_cast<const uint4*>(values(stage) + at.index);
            const bool bad = has_nonfinite<T>(x.x) || has_nonfinite<T>(x.y) || has_nonfinite<T>(x.z) ||
                             has_nonfinite<T>(x.w);
            found |= static_cast<uint32_t>(bad) << at.row_of_warp;
        }
        found = __reduce_or_sync(kAllLanes, found);
        if (lane() == 0) shared_.nonfinite[stage][warp()] = found;
    }

    // ---- one block of keys
    // ------------------------------------------------------------------------------------

    // Q as fragments; its place is free again once all warps have received the first block.
    __device__ void load_queries() {
        if constexpr (!Shape::kLarge) {
            wait_copies<1>();
            __syncthreads();
#pragma unroll
            for (int step = 0; step < kSteps; ++step) load_matrices(q_[step], query_row() + step * 16);
        }
    }

    // The keys of the warp's share of a block that this thread's lanes see, counted from the share's start.
    __device__ void find_visible(const KeyBlock& block) {
        const int window = static_cast<int>(launch_.args.window);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const bool reads = row_[r] >= block.row_begin && row_[r] < block.row_end;
            const int last = position_[r] + 1 - block.start;
            seen_[r].end = reads ? min(last, block.count) - first_key() : 0;
            seen_[r].begin = (window > 0 ? last - window : 0) - first_key();
        }
    }

    __device__ bool sees(int r, int key) const { return key >= seen_[r].begin && key < seen_[r].end; }

    __device__ void multiply(const KeyBlock& block, int stage) {
        const bool all = block.whole && block.count == kKeys;
        if (!all) {
            find_visible(block);
            const auto any = [](Range seen) { return max(seen.begin, 0) < min(seen.end, kWarpKeys); };
            if (!__any_sync(kAllLanes, any(seen_[0]) || any(seen_[1]))) return;
        }
        float s[kScoreTiles][4];
        score(s, stage);
        if (!map_.deferred()) {
#pragma unroll
            for (auto& tile : s) {
#pragma unroll
                for (float& x : tile) x = map_(x);
            }
        }
        if (!all) hide(s);
        soften(s);
        const uint64_t nonfinite = block.whole ? 0 : nonfinite_keys(stage);
        if (nonfinite == 0) {
            accumulate<false>(s, stage, 0);
        } else {
            accumulate<true>(s, stage, nonfinite);
            add_nonfinite(s, stage, nonfinite);
        }
    }

    // S = Q K^T.
    __device__ void score(float (&s)[kScoreTiles][4], int stage) {
        const T* row =
            keys(stage) + (first_key() + lane() / 16 * 8 + lane() % 8) * kStride + lane() / 8 % 2 * 8;
#pragma unroll
        for (auto& tile : s) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t (&q)[4] = q_[Shape::kLarge ? 0 : step];
            if constexpr (Shape::kLarge) load_matrices(q, query_row() + step * 16);
#pragma unroll
            for (int tile = 0; tile < kScoreTiles; tile += 2) {
                uint32_t k[4];  // two tiles of 8 keys x 16 elements
                load_matrices(k, row + tile * 8 * kStride + step * 16);
                mma<T>(s[tile], q, k[0], k[1]);
                mma<T>(s[tile + 1], q, k[2], k[3]);
            }
        }
    }

    __device__ void hide(float (&s)[kScoreTiles][4]) const {
#pragma unroll
        for (int tile = 0; tile < kScoreTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (!sees(i / 2, tile * 8 + lane() % 4 * 2 + i % 2)) s[tile][i] = -infinity();
            }
        }
    }

    // The online softmax: P in place of S, the state and O brought to the new max.
    __device__ void soften(float (&s)[kScoreTiles][4]) {
        const float factor = map_.factor();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = max_[r];
#pragma unroll
            for (const auto& tile : s) top = fmaxf(top, fmaxf(tile[2 * r], tile[2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
            const float shift = scaled(finite_top(top), factor),
                        alpha = exp2_fast(scaled(max_[r], factor) - shift);
            max_[r] = top;
            sum_[r] *= alpha;
#pragma unroll
            for (auto& tile : s) {
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; ++i) {
                    tile[i] = exp2_fast(fmaf(tile[i], factor, -shift));
                    sum_[r] += tile[i];
                }
            }
#pragma unroll
            for (auto& tile : out_) tile[2 * r] *= alpha, tile[2 * r + 1] *= alpha;
        }
    }

    // O += P V; with kBlank without the keys `blank`.
    template <bool kBlank>
    __device__ void accumulate(const float (&p)[kScoreTiles][4], int stage, uint64_t blank) {
        const T* row = values(stage) + (first_key() + lane() % 16) * kStride + lane() / 16 * 8;
#pragma unroll
        for (int step = 0; step < kWarpKeys / 16; ++step) {
            const float (&low)[4] = p[2 * step], (&high)[4] = p[2 * step + 1];
            const uint32_t a[4] = {pack_pair<T>(low[0], low[1]), pack_pair<T>(low[2], low[3]),
                                   pack_pair<T>(high[0], high[1]), pack_pair<T>(high[2], high[3])};
            const uint32_t keep_low = kBlank ? kept(blank, 16 * step) : ~0u,
                           keep_high = kBlank ? kept(blank, 16 * step + 8) : ~0u;
#pragma unroll
            for (int tile = 0; tile < kOutTiles; tile += 2) {
                uint32_t v[4];  // 16 keys x two tiles of 8 elements
                load_matrices_transposed(v, row + step * 16 * kStride + tile * 8);
                mma<T>(out_[tile], a, v[0] & keep_low, v[1] & keep_high);
                mma<T>(out_[tile + 1], a, v[2] & keep_low, v[3] & keep_high);
            }
        }
    }

    // ---- rows of V that are not finite
    // -------------------------------------------------------------------------

    // Bit k: key k of the warp's share.
    __device__ uint64_t nonfinite_keys(int stage) const {
        uint64_t bits = 0;
#pragma unroll
        for (int w = 0; w < Shape::kWarps; ++w) {
            bits |= static_cast<uint64_t>(shared_.nonfinite[stage][w]) << (w * kCopyRows);
        }
        bits >>= first_key();
        return kWarpKeys == 64 ? bits : bits & ((uint64_t{1} << kWarpKeys) - 1);
    }

    // The mask of this thread's two keys of the eight from `key`.
    __device__ uint32_t kept(uint64_t blank, int key) const {
        const uint32_t pair = static_cast<uint32_t>(blank >> (key + lane() % 4 * 2)) & 3u;
        return ~((pair & 1u ? 0x0000ffffu : 0u) | (pair & 2u ? 0xffff0000u : 0u));
    }

    __device__ void add_nonfinite(const float (&p)[kScoreTiles][4], int stage, uint64_t nonfinite) {
#pragma unroll 1
        for (uint64_t left = nonfinite; left != 0; left &= left - 1) {
            const int key = __ffsll(static_cast<int64_t>(left)) - 1;
            float weights[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) weights[r] = weight_of(p, key, r);
            const T* row = values(stage) + (first_key() + key) * kStride + lane() % 4 * 2;
#pragma unroll
            for (int tile = 0; tile < kOutTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (sees(i / 2, key)) out_[tile][i] += weights[i / 2] * to_float(row[tile * 8 + i % 2]);
                }
            }
        }
    }

    // P of this thread's lane r and any key: from the thread of its four that has that column.
    __device__ float weight_of(const float (&p)[kScoreTiles][4], int key, int r) const {
        uint32_t bits = 0;  // by masks, not by an index: P stays in registers
#pragma unroll
        for (int tile = 0; tile < kScoreTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
                bits |= __float_as_uint(p[tile][2 * r + i]) & -(tile * 4 + i == key / 8 * 4 + key % 2);
        }
        return __uint_as_float(__shfl_sync(kAllLanes, bits, lane() / 4 * 4 + key % 8 / 2));
    }

    // ---- the result
    // ------------------------------------------------------------------------------------------------

    // Through shared memory, [warp, lane of the warp, D]: a warp writes whole lanes, having merged the warps
    // that split the keys, in their order.
    __device__ void write() {
        float* stage = reinterpret_cast<float*>(stages_);
        wait_copies<0>();
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = warp() * 16 + r * 8 + lane() / 4;
            const float sum = reduce_lanes<4>(sum_[r], Add());
            if (lane() % 4 == 0) shared_.state[row] = {max_[r] * map_.factor(), sum};
#pragma unroll
            for (int tile = 0; tile < kOutTiles; ++tile) {
                const int d = tile * 8 + lane() % 4 * 2;
                *reinterpret_cast<float2*>(stage + row * Shape::kResultStride + d) = {out_[tile][2 * r],
                                                                                      out_[tile][2 * r + 1]};
            }
        }
        __syncthreads();
        for (int i = warp(); i < count_; i += Shape::kWarps) write_merged(i, stage);
        __syncthreads();
    }

    __device__ void write_merged(int lane_of_tile, const float* stage) const {
        SoftmaxState merged;
        float weights[kKeyWarps];
        const float2* states = shared_.state + lane_of_tile;
#pragma unroll
        for (int w = 0; w < kKeyWarps; ++w) merged.max = fmaxf(merged.max, states[w * kLanes].x);
#pragma unroll
        for (int w = 0; w < kKeyWarps; ++w) {
            weights[w] = weight(states[w * kLanes].x, merged.max);
            merged.sum += weights[w] * states[w * kLanes].y;
        }
        write_lane<T>(item_, first_ + lane_of_tile, merged, [&](int d) {
            float x = 0.0f;
#pragma unroll
            for (int w = 0; w < kKeyWarps; ++w) {
                x += weights[w] * stage[(w * kLanes + lane_of_tile) * Shape::kResultStride + d];
            }
            return x;
        });
    }

    const TreeAttentionLaunch& launch_;
    const Item& item_;
    const int first_, count_;  // the tile's lanes
    uint16_t* const stages_;   // [kStages, K and V, kKeys, kStride]
    MmaShared& shared_;
    const ScoreMap map_;
    int row_[2], position_[2];  // of this thread's lanes, g and g + 8; -1: there is none
    Range seen_[2];
    int64_t k_offset_ = 0, v_offset_ = 0;
    uint32_t q_[Shape::kLarge ? 1 : kSteps][4];
    float out_[kOutTiles][4] = {};
    float max_[2] = {-infinity(), -infinity()};  // raw where the map is deferred
    float sum_[2] = {0.0f, 0.0f};                // of this thread's columns
};

template <class T, int kDim>
__global__ void __launch_bounds__(MmaShape<kDim>::kThreads, 2)
    tree_attention_mma(const __grid_constant__ TreeAttentionLaunch launch) {
    using Shape = MmaShape<kDim>;
    extern __shared__ __align__(16) uint16_t stages[];
    __shared__ MmaShared shared;
    if (blockIdx.x >= launch.sizes->tasks * launch.args.num_kv_heads) return;
    const Item item(launch.args, blockIdx.x);
    for (int first = 0, lanes = item.lanes(); first < lanes;) {
        if (Shape::kNarrowRowWarps < Shape::kWideRowWarps && lanes - first <= 16 * Shape::kNarrowRowWarps) {
            MmaTile<T, kDim, Shape::kNarrowRowWarps>(launch, item, first, stages, shared).run();
            return;
        }
        MmaTile<T, kDim, Shape::kWideRowWarps>(launch, item, first, stages, shared).run();
        first += 16 * Shape::kWideRowWarps;
    }
}

}  // namespace tts::cuda
