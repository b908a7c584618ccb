// tree_attention on tensor cores: bfloat16 and float16, head sizes up to 256, padded to 64, 96, 128 or 256.
//
// A block of four or eight warps runs a task for one KV head, in tiles of lanes (query heads x rows that
// share keys):
//
//   S [16 lanes, 64 keys] = Q K^T    Q in registers or by ldmatrix, as K                 m16n8k16
//   B [16 lanes, D]       = P V      P = exp2(S - max) from S's registers, V by ldmatrix.trans
//
// for each block of keys (plan.h), starting from empty. B is then merged into the state C of its chunk. So a
// lane's result does not depend on the other lanes in its tile. In a wide tile (up to 64 or 128 lanes), each
// warp has 16 lanes of its own. In a narrow one (16 or 32 lanes), four warps have the same lanes. Each of
// them multiplies a quarter of the keys, and the scores are exchanged through shared memory. Then each warp
// computes all weights and has a quarter of D. An element of S or B is the same sum in both cases. (If D is
// 256 and there are 32 lanes, the warps work in two pairs.)
//
// The 2 x 64 x 128 x 2 bytes = 32 KB of K and V of one block are copied by cp.async while the block before is
// multiplied. With Q this is 90 KB for two blocks: an SM with 228 KB holds two such thread blocks, an SM with
// 164 KB one. With eight warps it is 111 KB, and one thread block on both. (If D is 256 there is only room
// for one block, and copying does not overlap.) Rows of shared memory are 16 bytes longer than D, so that the
// eight rows of an ldmatrix use different banks.
//
// Quantised heads (kCodes) are copied as codes, each to the end of the row that its elements will occupy.
// When a block has arrived, each warp decodes the rows that it copied, in place. From then on they are as in
// a plain cache. So a row is decoded once for all lanes that share it, to the same bits. Scales and zeros are
// copied in words of two, and `upper` tells which half is meant.
//
// Hidden keys have the score -inf, and tokens that no row of the tile sees are zeros in shared memory. A
// token that only some of the rows see may have infinities or NaN, and 0 * inf is NaN. Rows of V with such
// elements are detected when they arrive (only in blocks that some row sees in part). The elements are
// replaced by zeros in the fragments, and added by plain arithmetic to the lanes that see them.
#pragma once

#include "mma.cuh"
#include "quantized_kv.cuh"
#include "tree_attention_item.cuh"

namespace tts::cuda {

// A block of keys, or a part of it, that is in shared memory at once: [start, start + count). The start is a
// multiple of kKeyBlock, like that of every segment.
struct KeyBlock {
    int segment, start, count = 0;
    bool whole = true;  // every row of the tile sees all keys
};

// Iterates over the blocks of keys that some row of a tile sees.
class KeyBlocks {
  public:
    __device__ KeyBlocks(const Item& item, int row_begin, int row_end)
        : item_(item), row_begin_(row_begin), row_end_(row_end), index_(item.task.seg_begin - 1) {}

    // Moves to the first block, then to the next.
    __device__ void advance() {
        begin_ += kKeyBlock;
        if (begin_ >= end_ && !done()) next_segment();
    }

    __device__ bool done() const { return index_ >= item_.task.seg_end; }
    __device__ const Segment& segment() const { return item_.args.segments[index_]; }

    __device__ KeyBlock block() const {
        if (done()) return {};
        const int count = min(kKeyBlock, end_ - begin_);
        return {index_, begin_, count, begin_ >= all_begin_ && begin_ + count <= all_end_};
    }

  private:
    __device__ void next_segment() {
        for (++index_; !done(); ++index_) {
            const SeenRange view(item_.args, segment(), row_begin_, row_end_);
            if (view.begin >= view.end) continue;
            begin_ = view.begin, end_ = view.end, all_begin_ = view.all_begin, all_end_ = view.all_end;
            return;
        }
    }

    const Item& item_;
    const int row_begin_, row_end_;
    int index_, begin_ = 0, end_ = 0, all_begin_ = 0, all_end_ = 0;
};

// Two elements in the layout of a fragment, the first one in the lower half.
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

// A mask of the infinite and NaN elements of a pair: all bits of their exponents are set.
template <class T>
__device__ uint32_t nonfinite_mask(uint32_t pair) {
    constexpr uint32_t kExponent = __is_same(T, bf16) ? 0x7f807f80u : 0x7c007c00u;
    constexpr uint32_t kLowest = __is_same(T, bf16) ? 0x00800080u : 0x04000400u;
    return ((((pair & kExponent) + kLowest) >> 15) & 0x00010001u) * 0xffffu;
}

// The scales and zeros of a block of quantised keys and values.
template <int kWarps>
struct StagedNumbers {
    uint32_t words[4][kKeyBlock];  // with the scales of K and V, and the zeros of K and V
    uint32_t upper[kWarps];        // bit r: those of row r that the warp copied are in the upper halves
};

template <int kHeadDim, int kBlockWarps, bool kHasCodes>
struct MmaShape {
    static constexpr int kDim = kHeadDim, kWarps = kBlockWarps, kThreads = kWarps * kWarp;
    static constexpr bool kCodes = kHasCodes;
    static constexpr int kBlockLanes = kWarps / 4 * kHalfLanes;
    static constexpr bool kLarge = kDim > 128;
    static constexpr bool kKeepsQueries = kDim < 96;  // in registers; larger ones would spill
    static constexpr int kNarrowRowWarps = kLarge ? 2 : kWarps / 4, kWideRowWarps = kLarge ? 2 : kWarps;
    static constexpr int kStride = kDim + 8;            // elements from row to row of Q, K and V
    static constexpr int kTile = kKeyBlock * kStride;   // elements of a block of K or V
    static constexpr int kStages = kLarge ? 1 : 2;      // of K and V
    static constexpr int kScoreStride = kKeyBlock + 8;  // floats from row to row of exchanged scores
    // Where Q is, in elements: in the second stage, which is free until Q is in registers, or behind them
    // all.
    static constexpr int kQueries = kKeepsQueries ? 2 * kTile : kStages * 2 * kTile;
    static constexpr int kScores = kStages * 2 * kTile + (kKeepsQueries ? 0 : 16 * kWideRowWarps * kStride);
    static constexpr int kNumbers = 2 * kScores + 4 * 16 * kNarrowRowWarps * kScoreStride;  // bytes
    static constexpr int kShared = kNumbers + (kCodes ? kStages * sizeof(StagedNumbers<kWarps>) : 0);
    static_assert(!kKeepsQueries || 16 * kWideRowWarps * kStride <= 2 * kTile);
    static_assert(kWarps > 4 || kShared <= 97 << 10);
};

template <class Shape>
struct MmaShared {
    // [stage][warp]: bit r: row r of V that the warp copied has an infinity or a NaN
    uint32_t nonfinite[2][Shape::kWarps];
    float2 own[Shape::kThreads][2];  // the states of each thread's lanes: registers are scarce
};

// One tile of an item: lanes [first, first + 16 * kRowWarps), as far as they exist.
template <class T, class Shape, int kRowWarps>
class MmaTile {
    static constexpr int kDim = Shape::kDim;
    static constexpr int kStride = Shape::kStride, kTile = Shape::kTile;
    static constexpr int kLanes = 16 * kRowWarps, kDimWarps = Shape::kWarps / kRowWarps;
    static constexpr int kWarpKeys = kKeyBlock / kDimWarps;      // of a block, whose scores a warp works out
    static constexpr int kWarpDim = kDim / kDimWarps;            // of D, that a warp has
    static constexpr int kCopyRows = kKeyBlock / Shape::kWarps;  // of a block, that a warp copies
    static constexpr int kChunks = kDim / 8;                     // of 16 bytes per row
    static constexpr int kRowLanes = kChunks <= 8    ? 8
                                     : kChunks <= 16 ? 16
                                                     : 32,
                         kRowsAtOnce = kWarp / kRowLanes;
    static constexpr int kPasses = kCopyRows / kRowsAtOnce;
    static constexpr int kScoreTiles = kKeyBlock / 8, kOutTiles = kWarpDim / 8, kSteps = kDim / 16;
    static constexpr int kAtOnce =
        kOutTiles % 4 == 0 ? 4 : kOutTiles;       // tiles of D that are summed up at once
    using Weights = uint32_t[kKeyBlock / 16][4];  // P, as fragments
    static_assert(kAtOnce <= 4);

  public:
    __device__ MmaTile(const TreeAttentionLaunch& launch, const Item& item, int first, uint16_t* stages,
                       MmaShared<Shape>& shared)
        : launch_(launch),
          item_(item),
          first_(first),
          count_(min(kLanes, item.lanes() - first)),
          stages_(stages),
          shared_(shared),
          map_(launch.args),
          next_segment_(item.task.seg_begin) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            row_[r] = lane_of_tile(r) < count_ ? item.row(first + lane_of_tile(r)) : -1;
        }
    }

    // Each iteration copies a block of keys and multiplies the one before; the first iteration only copies.
    __device__ void run() {
        KeyBlocks ahead(item_, item_.row(first_), item_.row(first_ + count_ - 1) + 1);
        step(ahead);
        copy_queries();
        if constexpr (Shape::kStages == 1) {
            for (KeyBlock block = ahead.block(); block.count > 0; block = ahead.block()) {
                copy_keys(block, 0);
                receive(block, 0);
                step(ahead);
                multiply(block, 0);
                __syncthreads();
            }
        } else {
            KeyBlock block, next = ahead.block();
            for (int stage = 1; block.count + next.count > 0; stage ^= 1) {
                const bool first = block.count == 0;
                if (!first) receive(block, stage);
                if (next.count > 0) copy_keys(next, stage ^ 1);
                step(ahead);
                first ? load_queries() : multiply(block, stage);
                block = next;
                next = ahead.block();
            }
        }
        begin_segments(item_.task.seg_end);
        finish();
        wait_copies<0>();
        __syncthreads();
    }

  private:
    __device__ int row_warp() const { return warp() % kRowWarps; }
    __device__ int dim_warp() const { return warp() / kRowWarps; }
    __device__ int lane_of_tile(int r) const { return row_warp() * 16 + r * 8 + lane() / 4; }
    __device__ T* keys(int stage) const { return reinterpret_cast<T*>(stages_) + stage * 2 * kTile; }
    __device__ T* values(int stage) const { return keys(stage) + kTile; }
    __device__ T* queries() const { return reinterpret_cast<T*>(stages_) + Shape::kQueries; }
    __device__ float* scores() const { return reinterpret_cast<float*>(stages_ + Shape::kScores); }
    // A row of the warp's queries for load_matrices.
    __device__ const T* query_row() const {
        return queries() + (row_warp() * 16 + lane() % 16) * kStride + lane() / 16 * 8;
    }

    // ---- copies to shared memory --------------------------------------------------------------------------

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

    // Moves to the next block, and looks up the places of its tokens: lane l looks up row l % kCopyRows of
    // its warp's. The pages are loaded while the block before is multiplied.
    __device__ void step(KeyBlocks& ahead) {
        ahead.advance();
        const int row = warp() * kCopyRows + lane() % kCopyRows;
        const KeyBlock block = ahead.block();
        if (row < block.count) token_ = item_.place(ahead.segment(), block.start + row);
    }

    // Copies the block of `ahead` into a stage.
    __device__ void copy_keys(const KeyBlock& block, int stage) const {
        if constexpr (Shape::kCodes) {
            copy_numbers(block, stage);
#pragma unroll 1
            for (int pass = 0; pass < kPasses; ++pass) copy_codes(block, stage, pass);
        } else if (launch_.aligned) {
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) copy_chunks<true>(block, stage, pass);
        } else {
#pragma unroll 1
            for (int pass = 0; pass < kPasses; ++pass) copy_chunks<false>(block, stage, pass);
        }
        close_copies();
    }

    // Copies this lane's chunk in one pass over the rows of its warp, of K and of V.
    template <bool kAligned>
    __device__ void copy_chunks(const KeyBlock& block, int stage, int pass) const {
        const Chunk at(pass);
        const Place token = place_of(at);
        if (!at.exists()) return;
        const TreeAttentionArgs& args = launch_.args;
        const bool take = at.row < block.count && at.d < args.head_dim;
        const int64_t k = take ? item_.offset(args.k, token) + at.d : 0,
                      v = take ? item_.offset(args.v, token) + at.d : 0;
        copy<kAligned>(keys(stage) + at.index, static_cast<const T*>(args.k.data) + k, take);
        copy<kAligned>(values(stage) + at.index, static_cast<const T*>(args.v.data) + v, take);
    }

    // A pass copies kRowsAtOnce rows of the warp. With rows of 12 chunks, the remaining lanes do nothing.
    struct Chunk {
        int row_of_warp, row, d, index;  // index: in a stage's K or V

        __device__ explicit Chunk(int pass) {
            row_of_warp = pass * kRowsAtOnce + lane() / kRowLanes, row = warp() * kCopyRows + row_of_warp;
            d = lane() % kRowLanes * 8, index = row * kStride + d;
        }
        __device__ bool exists() const { return kRowLanes == kChunks || d < kDim; }
    };

    __device__ Place place_of(const Chunk& at) const {
        return {__shfl_sync(kAllLanes, token_.page, at.row_of_warp),
                __shfl_sync(kAllLanes, token_.slot, at.row_of_warp)};
    }

    // Waits for a block.
    __device__ void receive(const KeyBlock& block, int stage) const {
        wait_copies<0>();
        if constexpr (Shape::kCodes) make_elements(stage);
        if (!block.whole) find_nonfinite(stage);
        __syncthreads();
    }

    // Marks those rows of V copied by this warp that have an infinity or a NaN.
    __device__ void find_nonfinite(int stage) const {
        uint32_t found = 0;
        for (int pass = 0; pass < kPasses; ++pass) {
            const Chunk at(pass);
            if (!at.exists()) continue;
            const uint4 x = *reinterpret_cast<const uint4*>(values(stage) + at.index);
            const uint32_t bad = nonfinite_mask<T>(x.x) | nonfinite_mask<T>(x.y) | nonfinite_mask<T>(x.z) |
                                 nonfinite_mask<T>(x.w);
            found |= static_cast<uint32_t>(bad != 0) << at.row_of_warp;
        }
        found = __reduce_or_sync(kAllLanes, found);
        if (lane() == 0) shared_.nonfinite[stage][warp()] = found;
    }

    // ---- quantised heads ----------------------------------------------------------------------------------

    __device__ StagedNumbers<Shape::kWarps>& numbers(int stage) const {
        return reinterpret_cast<StagedNumbers<Shape::kWarps>*>(reinterpret_cast<char*>(stages_) +
                                                               Shape::kNumbers)[stage];
    }

    // The place of the codes of a row of K or V: at its end.
    __device__ static uint8_t* codes(T* block, const Chunk& at) {
        return reinterpret_cast<uint8_t*>(block + (at.row + 1) * kStride) - kDim;
    }

    // Copies the words with the scales and zeros of this lane's token; zeros after the last token.
    __device__ void copy_numbers(const KeyBlock& block, int stage) const {
        const TreeAttentionArgs& args = launch_.args;
        const int row = warp() * kCopyRows + lane() % kCopyRows;
        const bool take = row < block.count;
        const int64_t index = take ? item_.number(token_) : 0, odd = index % 2;
        const uint32_t upper = __ballot_sync(kAllLanes, odd != 0);
        if (lane() == 0) numbers(stage).upper[warp()] = upper;
        for (int which = lane() / kCopyRows; which < 4; which += kWarp / kCopyRows) {
            const KvScales& beside = which % 2 ? args.v_scales : args.k_scales;
            const f16* from = which < 2 ? beside.scale : beside.zero;
            uint32_t* to = &numbers(stage).words[which][row];
            if (!from) {
                *to = 0;
            } else if (launch_.aligned) {
                copy_word_async(to, from + index - odd, take ? 2 + 2 * static_cast<int>(odd) : 0);
            } else {
                *to = take ? from[index].bits * 0x10001u : 0;
            }
        }
    }

    // Copies this lane's 16 bytes in one pass over the rows of its warp, of K and of V.
    __device__ void copy_codes(const KeyBlock& block, int stage, int pass) const {
        const Chunk at(pass);
        const Place token = place_of(at);
        const TreeAttentionArgs& args = launch_.args;
        const int byte = 2 * at.d;
        const int left = static_cast<int>(code_bytes(args.format, args.head_dim)) - byte;
        if (left <= 0) return;
        const int bytes = at.row < block.count ? min(left, 16) : 0;
        copy_bytes(codes(keys(stage), at) + byte, args.k, token, byte, bytes);
        copy_bytes(codes(values(stage), at) + byte, args.v, token, byte, bytes);
    }

    // Copies 16 bytes of a row of codes, from `first` on; zeros after `bytes`.
    __device__ void copy_bytes(uint8_t* to, const PagedCache& cache, Place token, int first,
                               int bytes) const {
        const auto* from =
            static_cast<const uint8_t*>(cache.data) + (bytes ? item_.offset(cache, token) + first : 0);
        if (launch_.aligned) return copy_async(to, from, bytes);
#pragma unroll 1
        for (int i = 0; i < 16; ++i) to[i] = i < bytes ? from[i] : 0;
    }

    // Decodes the rows that this warp has copied. A pass reads all codes of its rows before it overwrites
    // them.
    __device__ void make_elements(int stage) const {
        const KvFormat format = launch_.args.format;
        const int dim = static_cast<int>(launch_.args.head_dim);
        __syncwarp();  // other lanes' copies
#pragma unroll 1
        for (int pass = 0; pass < kPasses; ++pass) {
            const Chunk at(pass);
            const bool has = at.d < dim;
            const uint2 k = has ? eight_codes(codes(keys(stage), at), at.d, dim, format) : uint2{},
                        v = has ? eight_codes(codes(values(stage), at), at.d, dim, format) : uint2{};
            __syncwarp();  // the codes have been read
            if (!at.exists()) continue;
            put_elements(keys(stage) + at.index, k, has, numbers_of(stage, at, 0));
            put_elements(values(stage) + at.index, v, has, numbers_of(stage, at, 1));
        }
    }

    // Scale and zero of a row of K (0) or V (1).
    __device__ KvNumbers numbers_of(int stage, const Chunk& at, int which) const {
        const StagedNumbers<Shape::kWarps>& all = numbers(stage);
        const uint32_t shift = (all.upper[warp()] >> at.row_of_warp & 1) * 16;
        const auto number = [&](int i) {
            return to_float(f16{static_cast<uint16_t>(all.words[i][at.row] >> shift)});
        };
        return {number(which), number(2 + which)};
    }

    // Stores eight elements; zeros after a head's last one.
    __device__ void put_elements(T* to, uint2 codes, bool has, KvNumbers numbers) const {
        const uint2 low = four_elements<T>(codes.x, launch_.args.format, numbers),
                    high = four_elements<T>(codes.y, launch_.args.format, numbers);
        *reinterpret_cast<uint4*>(to) = has ? uint4{low.x, low.y, high.x, high.y} : uint4{};
    }

    // ---- one block of keys --------------------------------------------------------------------------------

    // Loads Q as fragments. Its memory can be reused after all warps have received the first block.
    __device__ void load_queries() {
        if constexpr (Shape::kKeepsQueries) {
            wait_copies<1>();
            __syncthreads();
#pragma unroll
            for (int step = 0; step < kSteps; ++step) load_matrices(q_[step], query_row() + step * 16);
        }
    }

    // Finds the keys of a block that this thread's lanes see, counted from the block's start.
    __device__ void find_visible(const KeyBlock& block, bool all) {
        const Segment& segment = launch_.args.segments[block.segment];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            seen_[r] = {0, kKeyBlock};
            if (all) continue;
            const int position = row_[r] < 0 ? 0 : launch_.args.positions[row_[r]];
            const Range seen = visible(launch_.args, segment, row_[r], position);
            seen_[r] = {seen.begin - block.start, seen.end - block.start};
        }
    }

    __device__ bool sees(int r, int key) const { return key >= seen_[r].begin && key < seen_[r].end; }

    __device__ void multiply(const KeyBlock& block, int stage) {
        begin_segments(block.segment + 1);
        const bool all = block.whole && block.count == kKeyBlock;
        find_visible(block, all);
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
        SoftmaxState state[2];
        soften(s, state);
        Weights p;
#pragma unroll
        for (int step = 0; step < kKeyBlock / 16; ++step) {
            const float (&low)[4] = s[2 * step], (&high)[4] = s[2 * step + 1];
            p[step][0] = pack_pair<T>(low[0], low[1]), p[step][1] = pack_pair<T>(low[2], low[3]);
            p[step][2] = pack_pair<T>(high[0], high[1]), p[step][3] = pack_pair<T>(high[2], high[3]);
        }
        const uint64_t nonfinite = block.whole ? 0 : nonfinite_keys(stage);
        const Merge merged[2] = {{chunk_[0], state[0]}, {chunk_[1], state[1]}};
#pragma unroll
        for (int tile = 0; tile < kOutTiles; tile += kAtOnce) {
            if (nonfinite == 0) {
                accumulate<false>(p, merged, stage, tile, 0);
            } else {
                accumulate<true>(p, merged, stage, tile, nonfinite);
            }
        }
        chunk_[0] = merged[0].state, chunk_[1] = merged[1].state;
    }

    // S = Q K^T, for all keys in every warp.
    __device__ void score(float (&s)[kScoreTiles][4], int stage) {
        if constexpr (kDimWarps == 1) {
            score_keys(s, stage, 0);
        } else {
            constexpr int kMine = kWarpKeys / 8;
            float mine[kMine][4];
            score_keys(mine, stage, dim_warp() * kWarpKeys);
            float* row = scores() + (row_warp() * 16 + lane() / 4) * Shape::kScoreStride + lane() % 4 * 2;
            __syncthreads();  // the previous block's scores are no longer needed
#pragma unroll
            for (int tile = 0; tile < kMine; ++tile) {
                float* to = row + dim_warp() * kWarpKeys + tile * 8;
                *reinterpret_cast<float2*>(to) = {mine[tile][0], mine[tile][1]};
                *reinterpret_cast<float2*>(to + 8 * Shape::kScoreStride) = {mine[tile][2], mine[tile][3]};
            }
            __syncthreads();
#pragma unroll
            for (int tile = 0; tile < kScoreTiles; ++tile) {
                const float2 low = *reinterpret_cast<const float2*>(row + tile * 8),
                             high =
                                 *reinterpret_cast<const float2*>(row + 8 * Shape::kScoreStride + tile * 8);
                s[tile][0] = low.x, s[tile][1] = low.y, s[tile][2] = high.x, s[tile][3] = high.y;
            }
        }
    }

    // Scores of 8 * kTiles keys from `first` on.
    template <int kTiles>
    __device__ void score_keys(float (&s)[kTiles][4], int stage, int first) {
        const T* row = keys(stage) + (first + lane() / 16 * 8 + lane() % 8) * kStride + lane() / 8 % 2 * 8;
#pragma unroll
        for (auto& tile : s) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t (&q)[4] = q_[Shape::kKeepsQueries ? step : 0];
            if constexpr (!Shape::kKeepsQueries) load_matrices(q, query_row() + step * 16);
#pragma unroll
            for (int tile = 0; tile < kTiles; tile += 2) {
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

    // Replaces scores by weights, and finds the block's states. These are the same in the four threads of a
    // lane.
    __device__ void soften(float (&s)[kScoreTiles][4], SoftmaxState (&state)[2]) const {
        const float factor = map_.factor();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = -infinity();
#pragma unroll
            for (const auto& tile : s) top = fmaxf(top, fmaxf(tile[2 * r], tile[2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
            state[r].max = scaled(top, factor);
            const float shift = finite_top(state[r].max);
            float sum = 0.0f;
#pragma unroll
            for (auto& tile : s) {
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; ++i) {
                    tile[i] = exp2_fast(fmaf(tile[i], factor, -shift));
                    sum += tile[i];
                }
            }
            state[r].sum = reduce_lanes<4>(sum, Add());
        }
    }

    // B = P V for kAtOnce tiles of D from `tile` on, then C = merge(C, B). With kBlank, elements of V that
    // are not finite are left out and added one by one.
    template <bool kBlank>
    __device__ void accumulate(const Weights& p, const Merge (&merged)[2], int stage, int tile,
                               uint64_t nonfinite) {
        const T* row = values(stage) + lane() % 16 * kStride + dim_warp() * kWarpDim + tile * 8;
        float sums[kAtOnce][4] = {};
#pragma unroll
        for (int step = 0; step < kKeyBlock / 16; ++step) {
#pragma unroll
            for (int i = 0; i < kAtOnce; i += 2) {
                uint32_t v[4];  // 16 keys x two tiles of 8 elements, or twice the last one
                const bool two = i + 1 < kAtOnce;
                load_matrices_transposed(v, row + step * 16 * kStride + i * 8 + (two ? lane() / 16 * 8 : 0));
                if constexpr (kBlank) {
#pragma unroll
                    for (uint32_t& pair : v) pair &= ~nonfinite_mask<T>(pair);
                }
                mma<T>(sums[i], p[step], v[0], v[1]);
                if (two) mma<T>(sums[i + two], p[step], v[2], v[3]);
            }
        }
        if constexpr (kBlank) add_nonfinite(sums, p, stage, tile, nonfinite);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) rows_[tile + i][j] = merged[j / 2](rows_[tile + i][j], sums[i][j]);
        }
    }

    // ---- elements of V that are not finite ----------------------------------------------------------------

    // Bit k: key k of the block.
    __device__ uint64_t nonfinite_keys(int stage) const {
        uint64_t bits = 0;
#pragma unroll
        for (int w = 0; w < Shape::kWarps; ++w) {
            bits |= static_cast<uint64_t>(shared_.nonfinite[stage][w]) << (w * kCopyRows);
        }
        return bits;
    }

    __device__ void add_nonfinite(float (&sums)[kAtOnce][4], const Weights& p, int stage, int tile,
                                  uint64_t nonfinite) const {
#pragma unroll 1
        for (uint64_t left = nonfinite; left != 0; left &= left - 1) {
            const int key = __ffsll(static_cast<int64_t>(left)) - 1;
            const T* row = values(stage) + key * kStride + dim_warp() * kWarpDim + tile * 8 + lane() % 4 * 2;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float weight = weight_of(p, key, r);
#pragma unroll
                for (int i = 0; i < 2 * kAtOnce; ++i) {
                    const float x = to_float(row[i / 2 * 8 + i % 2]);
                    if (x - x != 0.0f && sees(r, key)) sums[i / 2][2 * r + i % 2] += weight * x;
                }
            }
        }
    }

    // P of this thread's lane r for any key: from that one of its four threads that has the column.
    __device__ float weight_of(const Weights& p, int key, int r) const {
        uint32_t pair = 0;  // by masks, not by an index, so that P stays in registers
#pragma unroll
        for (int step = 0; step < kKeyBlock / 16; ++step) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                pair |= p[step][2 * half + r] & -(step * 2 + half == key / 8);
        }
        pair = __shfl_sync(kAllLanes, pair, lane() / 4 * 4 + key % 8 / 2);
        return to_float(T{static_cast<uint16_t>(key % 2 ? pair >> 16 : pair)});
    }

    // ---- the states of chunks, and of the task ------------------------------------------------------------

    // Begins the states of all segments before `end`, and stores the lanes' previous states.
    __device__ void begin_segments(int end) {
        for (; next_segment_ < end; ++next_segment_) {
            const Segment& segment = launch_.args.segments[next_segment_];
            if (!segment.fresh) continue;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (row_[r] < segment.row_begin || row_[r] >= segment.row_end) continue;
                put_away(r);
                chunk_[r] = {};
#pragma unroll
                for (int tile = 0; tile < kOutTiles; ++tile)
                    rows_[tile][2 * r] = rows_[tile][2 * r + 1] = 0.0f;
                target_[r] = segment.slot < 0 ? kOwn : segment.slot + row_[r] - segment.row_begin;
            }
        }
    }

    __device__ int head(int r) const { return item_.head(first_ + lane_of_tile(r)); }

    // f(d, tile) for the first of each pair of D's elements that this thread has.
    template <class F>
    __device__ void each_pair(F f) const {
#pragma unroll
        for (int tile = 0; tile < kOutTiles; ++tile) {
            const int d = dim_warp() * kWarpDim + tile * 8 + lane() % 4 * 2;
            if (d < launch_.args.head_dim) f(d, tile);
        }
    }

    // Merges a lane's chunk into the task's own state, or stores it in its slot.
    __device__ void put_away(int r) {
        if (target_[r] == kNone) return;
        if (target_[r] == kOwn) return join_own(r);
        write_slot(target_[r], r);
    }

    __device__ void write_slot(int64_t slot, int r) const {
        float* to = slot_row(launch_.args, slot, head(r));
        each_pair([&](int d, int tile) {
            *reinterpret_cast<float2*>(to + d) = {rows_[tile][2 * r], rows_[tile][2 * r + 1]};
        });
        if (dim_warp() == 0 && lane() % 4 == 0)
            *slot_state(launch_.args, slot, head(r)) = {chunk_[r].max, chunk_[r].sum};
    }

    __device__ float2& own_state(int r) const { return shared_.own[threadIdx.x][r]; }
    __device__ float* own_row(int r) const {
        return launch_.own +
               (int64_t{blockIdx.x} * Shape::kBlockLanes + lane_of_tile(r)) * launch_.args.head_dim;
    }

    // Merges the task's own state and the chunk; the result replaces the chunk.
    __device__ void take_own(int r) {
        if (!has_own_[r]) return;
        const Merge merged({own_state(r).x, own_state(r).y}, chunk_[r]);
        const float* from = own_row(r);
        each_pair([&](int d, int tile) {
            const float2 x = *reinterpret_cast<const float2*>(from + d);
            rows_[tile][2 * r] = merged(x.x, rows_[tile][2 * r]);
            rows_[tile][2 * r + 1] = merged(x.y, rows_[tile][2 * r + 1]);
        });
        chunk_[r] = merged.state;
    }

    __device__ void join_own(int r) {
        take_own(r);
        float* to = own_row(r);
        each_pair([&](int d, int tile) {
            *reinterpret_cast<float2*>(to + d) = {rows_[tile][2 * r], rows_[tile][2 * r + 1]};
        });
        own_state(r) = {chunk_[r].max, chunk_[r].sum}, has_own_[r] = true;
    }

    // Stores the results of rows that are not merged, and the first states of the others.
    __device__ void finish() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (target_[r] == kNone) continue;
            if (target_[r] != kOwn) {
                write_slot(target_[r], r);
                if (!has_own_[r]) continue;
                chunk_[r] = {};
#pragma unroll
                for (int tile = 0; tile < kOutTiles; ++tile)
                    rows_[tile][2 * r] = rows_[tile][2 * r + 1] = 0.0f;
            }
            take_own(r);
            if (is_merged(launch_.args, row_[r])) {
                write_slot(int64_t{item_.task.slot} + row_[r] - item_.task.row_begin, r);
            } else {
                write_result(r);
            }
        }
    }

    __device__ void write_result(int r) const {
        const TreeAttentionArgs& args = launch_.args;
        const int64_t index = int64_t{args.rows[row_[r]]} * args.num_q_heads + head(r);
        const Result result(args, head(r), chunk_[r]);
        T* out = static_cast<T*>(args.out) + index * args.head_dim;
        each_pair([&](int d, int tile) {
            *reinterpret_cast<uint32_t*>(out + d) =
                pack_pair<T>(result(rows_[tile][2 * r]), result(rows_[tile][2 * r + 1]));
        });
        if (dim_warp() == 0 && lane() % 4 == 0) args.lse[index] = result.lse;
    }

    const TreeAttentionLaunch& launch_;
    const Item& item_;
    const int first_, count_;  // the tile's lanes
    uint16_t* const stages_;   // [kStages, K and V, kKeyBlock, kStride], then Q and scores
    MmaShared<Shape>& shared_;
    const ScoreMap map_;
    int next_segment_;  // the first whose states have not begun
    int row_[2];        // of this thread's lanes, g and g + 8; -1: there is none
    Range seen_[2];
    Place token_ = {0, 0};  // the place that this lane has looked up for the next block
    uint32_t q_[Shape::kKeepsQueries ? kSteps : 1][4];
    float rows_[kOutTiles][4] = {};  // C: sums of weighted values
    SoftmaxState chunk_[2];
    int target_[2] = {kNone, kNone};  // of C: a slot, or the task's own state
    bool has_own_[2] = {false, false};
};

template <class T, int kDim, int kWarps, bool kCodes>
__global__ void __launch_bounds__(MmaShape<kDim, kWarps, kCodes>::kThreads, 8 / kWarps)
    tree_attention_mma(const __grid_constant__ TreeAttentionLaunch launch) {
    using Shape = MmaShape<kDim, kWarps, kCodes>;
    extern __shared__ __align__(16) uint16_t stages[];
    __shared__ MmaShared<Shape> shared;
    each_item<Shape::kBlockLanes>(launch, [&](const Item& item, int begin, int end) {
        for (int first = begin; first < end;) {
            if (Shape::kNarrowRowWarps < Shape::kWideRowWarps && end - first <= 16 * Shape::kNarrowRowWarps) {
                MmaTile<T, Shape, Shape::kNarrowRowWarps>(launch, item, first, stages, shared).run();
                break;
            }
            MmaTile<T, Shape, Shape::kWideRowWarps>(launch, item, first, stages, shared).run();
            first += 16 * Shape::kWideRowWarps;
        }
    });
}

}  // namespace tts::cuda
