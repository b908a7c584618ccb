// What the two ways of running a segment (few lanes, many lanes) share: sizes, element traits, scratch,
// addresses.
//
// A *lane* is one query head of one row: lane = (row - hull begin) * group + head within the group.
// Everything of a work item that is per lane is an array over lanes.
#pragma once

#include "online_softmax.h"
#include "tree_attention.h"

TTS_BEGIN_ISA

#if defined(__AVX512BF16__)
inline constexpr bool kHasPairs = true;
#else
inline constexpr bool kHasPairs = false;
#endif

// Whether T is multiplied as pairs of bfloat16 (vdpbf16ps) rather than as float32. A pair is kept in a
// float's place and moved by float instructions, which do not touch its bits.
template <class T>
inline constexpr bool kPairs = false;
template <>
inline constexpr bool kPairs<bf16> = kHasPairs;

inline constexpr int64_t kKeyBlock = 64;  // keys a block: one block of scores stays in the L1 cache
#if defined(__AVX512F__)
inline constexpr int kTileRows = 8, kTileVecs = 3;  // 24 accumulators, 3 + 1 operands of 32 registers
#else
inline constexpr int kTileRows = 4, kTileVecs = 3;  // 12 accumulators, 3 + 1 operands of 16 registers
#endif
inline constexpr int64_t kNarrow = 8;  // lanes up to which a segment is run unpacked

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// c + a * b: of floats, or of pairs of bfloat16 (both products added).
template <bool kIsPairs>
inline Vec mac(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
    if constexpr (kIsPairs) {
        return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
    }
#endif
    return fma(a, b, c);
}

// Keys of a segment that a row sees, counted from the segment's start.
struct Visible {
    int64_t begin, end;
    bool operator==(const Visible&) const = default;
};

// A thread's scratch, cut into arrays; each starts on a cache line.
struct Scratch {
    int64_t lanes_pad, dim_pad;  // lanes with room for a tile that overhangs; D in whole vectors
    float* row;                  // [lanes, dim_pad] the item's state: rows of weighted values
    SoftmaxState* state;         // [lanes]
    Visible* visible;            // [lanes] of the segment in hand
    // few lanes
    float* q_rows;  // [kNarrow, dim_pad] queries as they are multiplied
    float* scores;  // [kKeyBlock, kTileVecs * width], or [4, kKeyBlock]
    // many lanes
    float* q_pack;        // [D or pairs, lanes_pad]
    float* k_block;       // [kKeyBlock, D or pairs]
    float* v_block;       // [kKeyBlock or pairs, dim_pad]
    float* tile_row;      // [dim_pad, lanes_pad] the segment's state, transposed
    float* tile_max;      // [lanes_pad]
    float* tile_sum;      // [lanes_pad]
    float* stage;         // [width, dim_pad]
    const void** k_rows;  // [kKeyBlock]
    const void** v_rows;  // [kKeyBlock]

    // Cuts `base`; with a null base only `end` is of use.
    Scratch(float* base, int64_t lanes, int64_t head_dim) : at_(base) {
        constexpr int64_t W = Vec::width;
        lanes_pad = round_up(lanes, W) + kTileVecs * W;
        dim_pad = round_up(head_dim, 2 * W);
        row = take(lanes * dim_pad);
        state = reinterpret_cast<SoftmaxState*>(take(lanes * 2));
        visible = reinterpret_cast<Visible*>(take(lanes * 4));
        q_rows = take(kNarrow * dim_pad);
        scores = take(kKeyBlock * kTileVecs * W);
        q_pack = take(dim_pad * lanes_pad);
        k_block = take(kKeyBlock * dim_pad);
        v_block = take(kKeyBlock * dim_pad);
        tile_row = take(dim_pad * lanes_pad);
        tile_max = take(lanes_pad);
        tile_sum = take(lanes_pad);
        stage = take(W * dim_pad);
        k_rows = reinterpret_cast<const void**>(take(kKeyBlock * 2));
        v_rows = reinterpret_cast<const void**>(take(kKeyBlock * 2));
    }
    int64_t size() const { return used_; }

  private:
    float* take(int64_t floats) {
        float* p = at_ ? at_ + used_ : nullptr;
        used_ += round_up(floats, 16);
        return p;
    }
    float* at_;
    int64_t used_ = 0;
};

// A work item in progress.
template <class T>
struct Item {
    const TreeAttentionArgs& args;
    const Task& task;
    int64_t kv_head, group;
    Scratch scratch;
    bool q_packed = false;

    int64_t lanes() const { return (task.row_end - task.row_begin) * group; }

    // The query of a lane of the item: D elements.
    const T* query(int64_t lane) const {
        const int64_t row = args.rows[task.row_begin + lane / group], head = kv_head * group + lane % group;
        return static_cast<const T*>(args.q) + row * args.q_row_stride + head * args.q_head_stride;
    }

    // Addresses of this head's keys and values of tokens [begin, begin + count) of a segment; page by page.
    void locate(const Segment& segment, int64_t begin, int64_t count) const {
        locate(args.k, segment, begin, count, scratch.k_rows);
        locate(args.v, segment, begin, count, scratch.v_rows);
    }

    Visible visible(const Segment& segment, int64_t row) const {
        const int64_t position = args.positions[row], length = segment.length;
        const int64_t end = position + 1 - segment.start;
        const int64_t begin = args.window > 0 ? end - args.window : 0;
        const int64_t first = begin < 0 ? 0 : begin;
        const int64_t last = end > length ? length : end;
        return first < last ? Visible{first, last} : Visible{0, 0};
    }

  private:
    void locate(const PagedCache& cache, const Segment& segment, int64_t begin, int64_t count,
                const void** rows) const {
        const T* base = static_cast<const T*>(cache.data) + kv_head * cache.head_stride;
        const int32_t* pages = args.pages + segment.page_begin;
        int64_t page = begin / args.page_size, offset = begin % args.page_size;
        for (int64_t i = 0; i < count; ++page, offset = 0) {
            const T* p = base + pages[page] * cache.page_stride + offset * cache.token_stride;
            const int64_t left = args.page_size - offset, end = i + (left < count - i ? left : count - i);
            for (; i < end; ++i, p += cache.token_stride) rows[i] = p;
        }
    }
};

// Scores are compared and exponentiated in units of log2. Without a softcap and with a positive scale the raw
// scores can be compared as they are, and the factor is applied within the exponent.
struct ScoreMap {
    float scale, softcap;
    bool deferred() const { return softcap == 0.0f && scale > 0.0f; }
    float factor() const { return deferred() ? scale * kLog2E : 1.0f; }
    Vec operator()(Vec raw) const {
        const Vec x = raw * Vec::all(scale);
        if (softcap == 0.0f) return x * Vec::all(kLog2E);
        return tanh(x / Vec::all(softcap)) * Vec::all(softcap * kLog2E);
    }
};

TTS_END_ISA
