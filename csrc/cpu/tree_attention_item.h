// The common part of both ways to run a segment (few lanes, many lanes): sizes, element traits, scratch,
// addresses.
//
// A *lane* is one query head of one row: lane = (row - hull begin) * group + head within the group.
// All data of a work item for lanes are arrays over lanes.
#pragma once

#include "integers.h"
#include "online_softmax.h"
#include "quantized_kv.h"
#include "tree_attention.h"

TTS_BEGIN_ISA

#if defined(__AVX512BF16__)
inline constexpr bool kHasPairs = true;
#else
inline constexpr bool kHasPairs = false;
#endif

// Whether T is multiplied as pairs of bfloat16 (vdpbf16ps) and not as float32. A pair is stored in the place
// of a float and moved by float instructions, which do not change its bits.
template <class T>
inline constexpr bool kPairs = false;
template <>
inline constexpr bool kPairs<bf16> = kHasPairs;

#if defined(__AVX512F__)
inline constexpr int kLaneTileRows = 8, kTileVecs = 3;  // 24 accumulators, 3 + 1 operands of 32 registers
#else
inline constexpr int kLaneTileRows = 4, kTileVecs = 3;  // 12 accumulators, 3 + 1 operands of 16 registers
#endif

// c + a * b: of floats, or of pairs of bfloat16 (both products are added).
template <bool kIsPairs>
inline Vec mac(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
    if constexpr (kIsPairs) {
        return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
    }
#endif
    return fma(a, b, c);
}

#if defined(__AVX512BF16__)
// 32 elements of a and of b in pairs: (a[0], b[0]) ... (a[15], b[15]), and the other 16.
struct Pairs {
    __m512i low, high;
};
inline Pairs interleave(__m512i a, __m512i b) {
    alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    return {_mm512_permutex2var_epi16(a, low, b), _mm512_permutex2var_epi16(a, high, b)};
}
#endif

// Number of steps of a product over `n` elements or keys.
template <class T>
inline int64_t num_steps(int64_t n) {
    return kPairs<T> ? (n + 1) / 2 : n;
}

inline int64_t block_floor(int64_t token) { return token / kKeyBlock * kKeyBlock; }

// Sums of products: each is a chain of multiply-adds, in order. Without fused multiply-adds, every step
// rounds twice; then a chain is cut into links, which are summed separately.
#if defined(__FMA__)
inline constexpr bool kLinked = false;
#else
inline constexpr bool kLinked = true;
#endif
inline constexpr int64_t kLink = 8;  // steps

template <int kCount>
struct Chains {
    Vec acc[kCount];
    Vec sum[kLinked ? kCount : 1];

    Chains() {
#pragma GCC unroll 32
        for (int i = 0; i < kCount; ++i) acc[i] = Vec::zero();
        if constexpr (kLinked) {
            for (int i = 0; i < kCount; ++i) sum[i] = Vec::zero();
        }
    }
    // To be called after `steps` steps in total.
    void link(int64_t steps) {
        if constexpr (kLinked) {
            if (steps % kLink == 0) finish();
        }
    }
    void finish() {
        if constexpr (kLinked) {
            for (int i = 0; i < kCount; ++i) sum[i] = sum[i] + acc[i], acc[i] = Vec::zero();
        }
    }
    Vec total(int i) const {
        if constexpr (kLinked) return sum[i];
        return acc[i];
    }
};

// 2**x, as accurate as a weight for values of type T needs.
template <class T>
inline Vec weight_of_score(Vec x) {
    return kPairs<T> ? exp2_weight<4>(x) : exp2_weight<5>(x);  // rounded to bfloat16, or kept
}

// The keys of a segment that a row sees, counted from the segment's start.
struct Visible {
    int64_t begin, end;
    bool operator==(const Visible&) const = default;
};

// Whether a task has segments whose states stay in the task.
inline bool has_own_states(const Segment* segments, const Task& task) {
    bool any = false;
    for (int64_t i = task.seg_begin; i < task.seg_end; ++i) any |= segments[i].slot < 0;
    return any;
}

// A thread's scratch, cut into arrays. Each array starts on a cache line.
struct Scratch {
    int64_t lanes_pad, dim_pad;  // lanes with room for a tile that overhangs; D in whole vectors
    Visible* visible;            // [lanes] of the segment in hand
    const void** k_rows;         // [kKeyBlock] of the block in hand
    const void** v_rows;         // [kKeyBlock]
    const void** next_rows;      // [2, kKeyBlock] of the block after it
    float* scores;               // [kKeyBlock, kTileVecs * width], or [4, kKeyBlock]
    // quantised caches: the block in hand as it is stored, and one head of it as elements
    const void **k_codes, **v_codes;  // [kKeyBlock]
    int64_t* slots;                   // [kKeyBlock]
    float *k_plain, *v_plain;         // [kKeyBlock, dim_pad], or half of that
    // the task's own states: a lane's chunk in hand and what its chunks so far have made
    float *chunk_rows, *own_rows;             // [heads, lanes, dim_pad]
    SoftmaxState *chunk_states, *own_states;  // [heads, lanes]
    bool* begun;                              // [heads, lanes]
    // few lanes
    float* q_rows;  // [heads, kNarrow, dim_pad] queries as they are multiplied
    // many lanes
    float* q_pack;    // [D or pairs, lanes_pad]
    float* k_block;   // [kKeyBlock, D or pairs]
    float* v_block;   // [kKeyBlock or pairs, dim_pad]
    float* tile_row;  // [dim_pad, lanes_pad] the state in hand, transposed
    float* tile_max;  // [lanes_pad]
    float* tile_sum;  // [lanes_pad]
    float* stage;     // [width, dim_pad]

    // Cuts `base` into the arrays. If `base` is null, only `size` is valid. `states`: lanes x heads, or 0 for
    // a task without states of its own.
    Scratch(float* base, int64_t lanes, int64_t heads, int64_t states, int64_t head_dim, bool quantized)
        : at_(base) {
        constexpr int64_t W = Vec::width;
        lanes_pad = round_up(lanes, W) + kTileVecs * W;
        dim_pad = round_up(head_dim, 2 * W);
        take(visible, lanes);
        take(k_rows, kKeyBlock);
        take(v_rows, kKeyBlock);
        take(next_rows, 2 * kKeyBlock);
        take(scores, kKeyBlock * kTileVecs * W);
        const int64_t keys = quantized ? kKeyBlock : 0;
        take(k_codes, keys);
        take(v_codes, keys);
        take(slots, keys);
        take(k_plain, keys * dim_pad);
        take(v_plain, keys * dim_pad);
        take(chunk_rows, states * dim_pad);
        take(own_rows, states * dim_pad);
        take(chunk_states, states);
        take(own_states, states);
        take(begun, states);
        take(q_rows, heads * kNarrow * dim_pad);
        take(q_pack, dim_pad * lanes_pad);
        take(k_block, kKeyBlock * dim_pad);
        take(v_block, kKeyBlock * dim_pad);
        take(tile_row, dim_pad * lanes_pad);
        take(tile_max, lanes_pad);
        take(tile_sum, lanes_pad);
        take(stage, W * dim_pad);
    }
    int64_t size() const { return used_; }

  private:
    template <class E>
    void take(E*& array, int64_t count) {
        array = at_ ? reinterpret_cast<E*>(at_ + used_) : nullptr;
        used_ += round_up(count * static_cast<int64_t>(sizeof(E)), 64) / 4;
    }
    float* at_;
    int64_t used_ = 0;
};

// Prefetches the keys and values of the next block, a few cache lines at a time between other work. Pages are
// at arbitrary addresses, so no hardware prefetcher finds them.
class KeyPrefetch {
  public:
    // The next targets: rows of K, then the same number of V, each in `pieces` pieces of `bytes` bytes, one
    // stride apart. All are fetched within about `calls` steps.
    void aim(const void** rows, int64_t keys, int64_t pieces, int64_t bytes, int64_t k_stride,
             int64_t v_stride, int64_t calls) {
        *this = KeyPrefetch();
        rows_ = rows, keys_ = keys, pieces_ = pieces, bytes_ = bytes;
        k_stride_ = k_stride, v_stride_ = v_stride;
        const int64_t lines = 2 * keys * pieces * divide_up(bytes, kLine);
        quota_ = divide_up(lines, calls);
    }
    void aim_nowhere() { keys_ = 0; }

    void step() {
        for (int64_t n = quota_; n > 0 && row_ < 2 * keys_;) {
            const int64_t stride = row_ < keys_ ? k_stride_ : v_stride_;
            const char* line = static_cast<const char*>(rows_[row_]) + piece_ * stride + offset_;
            const int64_t left = divide_up(bytes_ - offset_, kLine), lines = left < n ? left : n;
            for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(line + i * kLine, 0, 2);
            n -= lines;
            if (lines < left) {
                offset_ += lines * kLine;
                return;
            }
            offset_ = 0;
            if (++piece_ < pieces_) continue;
            piece_ = 0;
            ++row_;
        }
    }

  private:
    static constexpr int64_t kLine = 64;
    const void** rows_ = nullptr;
    int64_t keys_ = 0, pieces_ = 0, bytes_ = 0, k_stride_ = 0, v_stride_ = 0;
    int64_t row_ = 0, piece_ = 0, offset_ = 0;  // the next line
    int64_t quota_ = 0;                         // lines for each step
};

// The place of a state.
struct StateRef {
    SoftmaxState& state;
    float* row;  // [D], padded to whole vectors

    void clear(int64_t dim) const {
        state = SoftmaxState{};
        for (int64_t d = 0; d < dim; d += Vec::width) Vec::zero().store(row + d);
    }
    void copy(const StateRef& other, int64_t dim) const {
        state = other.state;
        for (int64_t d = 0; d < dim; d += Vec::width) Vec::load(other.row + d).store(row + d);
    }
    // Merges another state into this one.
    void absorb(const StateRef& other, int64_t dim) const {
        const MergeWeights w = merge(state, other.state);
        const Vec a = Vec::all(w.a), b = Vec::all(w.b);
        for (int64_t d = 0; d < dim; d += Vec::width) {
            merge_rows(Vec::load(row + d), a, Vec::load(other.row + d), b).store(row + d);
        }
        state = w.state;
    }
};

// Whether the plan lists states of a row to merge.
inline bool is_merged(const TreeAttentionArgs& args, int64_t row) {
    return args.merge_indptr[row + 1] > args.merge_indptr[row];
}

inline StateRef slot_ref(const TreeAttentionArgs& args, int64_t slot, int64_t head) {
    const int64_t index = slot * args.num_q_heads + head;
    return {reinterpret_cast<SoftmaxState*>(args.partial_states)[index],
            args.partial_rows + index * args.padded_dim};
}

// A work item in progress, with its current head.
template <class T>
struct Item {
    const TreeAttentionArgs& args;
    const Task& task;
    const int64_t head_begin, head_end, group, lanes;
    const bool has_own;  // states of its own
    const bool quantized;
    const int64_t element, row_bytes;  // bytes of what strides count, and of a stored head
    const Scratch scratch;
    KeyPrefetch prefetch;
    int64_t kv_head = -1, packed_head = -1;  // in hand; whose queries are in q_pack
    int64_t k_offset = 0, v_offset = 0;      // elements from the first head's keys and values to this one's

    Item(const TreeAttentionArgs& a, WorkItem item, float* base)
        : args(a),
          task(a.tasks[item.task]),
          head_begin(item.head_begin),
          head_end(item.head_end),
          group(a.num_q_heads / a.num_kv_heads),
          lanes((task.row_end - task.row_begin) * group),
          has_own(has_own_states(a.segments, task)),
          quantized(a.format != KvFormat::plain),
          element(quantized ? 1 : sizeof(T)),
          row_bytes(a.format == KvFormat::int4 ? a.head_dim / 2 : a.head_dim * element),
          scratch(base, lanes, heads(), has_own ? heads() * lanes : 0, a.head_dim, quantized) {
        if (has_own) __builtin_memset(scratch.begun, 0, static_cast<uint64_t>(heads() * lanes));
    }

    int64_t heads() const { return head_end - head_begin; }

    void select(int64_t head) {
        kv_head = head;
        if (quantized) return;  // dequantize() decodes only this head
        k_offset = (head - head_begin) * args.k.head_stride;
        v_offset = (head - head_begin) * args.v.head_stride;
    }

    // ---- states of the current head ----

    int64_t row_of(int64_t lane) const { return task.row_begin + lane / group; }
    int64_t head_of(int64_t lane) const { return kv_head * group + lane % group; }

    // The place of a lane's state for a segment.
    StateRef state(const Segment& s, int64_t lane) const {
        if (s.slot < 0) return chunk(lane);
        return slot_ref(args, s.slot + row_of(lane) - s.row_begin, head_of(lane));
    }

    // Lanes of a segment's rows.
    int64_t first_lane(const Segment& s) const { return (s.row_begin - task.row_begin) * group; }
    int64_t num_lanes(const Segment& s) const { return (s.row_end - s.row_begin) * group; }

    // To be called for each segment. States that begin in it are empty afterwards.
    void begin(const Segment& s) const {
        if (!s.fresh) return;
        const int64_t first = first_lane(s), end = first + num_lanes(s);
        for (int64_t lane = first; lane < end; ++lane) {
            if (s.slot < 0) end_chunk(lane);
            state(s, lane).clear(args.head_dim);
        }
    }

    // Merges the lane's current chunk into its own state.
    void end_chunk(int64_t lane) const {
        bool& begun = scratch.begun[own_index(lane)];
        if (begun) {
            own(lane).absorb(chunk(lane), args.head_dim);
        } else {
            own(lane).clear(args.head_dim);
        }
        begun = true;
    }

    bool begun(int64_t lane) const { return has_own && scratch.begun[own_index(lane)]; }
    StateRef own(int64_t lane) const {
        const int64_t i = own_index(lane);
        return {scratch.own_states[i], scratch.own_rows + i * scratch.dim_pad};
    }
    StateRef chunk(int64_t lane) const {
        const int64_t i = own_index(lane);
        return {scratch.chunk_states[i], scratch.chunk_rows + i * scratch.dim_pad};
    }
    int64_t own_index(int64_t lane) const { return (kv_head - head_begin) * lanes + lane; }

    // ---- queries, keys, values ----

    // Calls f(lane, query) for lanes [begin, end) of the current head; a query is D elements.
    template <class F>
    void each_query(int64_t begin, int64_t end, F f) const {
        const T* q = static_cast<const T*>(args.q) + kv_head * group * args.q_head_stride;
        for (int64_t lane = begin, r = begin / group, g = begin % group; lane < end; ++r, g = 0) {
            const T* head = q + args.rows[task.row_begin + r] * args.q_row_stride + g * args.q_head_stride;
            for (; g < group && lane < end; ++g, ++lane, head += args.q_head_stride) f(lane, head);
        }
    }

    // Finds the addresses of the first head's keys and values for tokens [begin, begin + count) of a segment,
    // page by page.
    void locate(const Segment& segment, int64_t begin, int64_t count) const {
        locate(args.k, segment, begin, count, quantized ? scratch.k_codes : scratch.k_rows);
        locate(args.v, segment, begin, count, quantized ? scratch.v_codes : scratch.v_rows);
        if (!quantized) return;
        each_page(segment, begin, count, [&](int64_t page, int64_t offset, int64_t i, int64_t end) {
            for (int64_t slot = page * args.page_size + offset; i < end; ++i) scratch.slots[i] = slot++;
        });
    }

    // Decodes the located keys and values of the current head, once for all lanes. To be called before they
    // are read.
    void dequantize(int64_t count) const {
        if (args.format == KvFormat::int8) dequantize<KvFormat::int8>(count);
        if (args.format == KvFormat::int4) dequantize<KvFormat::int4>(count);
    }
    const T* key(int64_t i) const { return static_cast<const T*>(scratch.k_rows[i]) + k_offset; }
    const T* value(int64_t i) const { return static_cast<const T*>(scratch.v_rows[i]) + v_offset; }

    // To be called when the current block ends at token `end` of a segment: its `calls` calls of
    // prefetch.step() will fetch the next data of this task.
    void look_ahead(const Segment& segment, int64_t end, int64_t calls) {
        const Segment* next = &segment;
        if (end >= segment.length) end = 0, ++next;
        if (next == args.segments + task.seg_end) return prefetch.aim_nowhere();
        const int64_t left = next->length - end, count = left < kKeyBlock ? left : kKeyBlock;
        locate(args.k, *next, end, count, scratch.next_rows);
        locate(args.v, *next, end, count, scratch.next_rows + count);
        const int64_t k_stride = args.k.head_stride * element, v_stride = args.v.head_stride * element;
        const bool dense = k_stride == row_bytes && v_stride == row_bytes;
        prefetch.aim(scratch.next_rows, count, dense ? 1 : heads(), (dense ? heads() : 1) * row_bytes,
                     k_stride, v_stride, calls);
        if (quantized) prefetch_scales(*next, end, count);
    }

    Visible visible(const Segment& segment, int64_t r) const {
        const int64_t position = args.positions[r], length = segment.length;
        const int64_t end = position + 1 - segment.start;
        const int64_t begin = args.window > 0 ? end - args.window : 0;
        const int64_t first = begin < 0 ? 0 : begin;
        const int64_t last = end > length ? length : end;
        return first < last ? Visible{first, last} : Visible{0, 0};
    }

  private:
    // Calls f(page, offset, i, end) for each page with tokens of [begin, begin + count) of a segment. The
    // tokens begin + [i, end) are in this page, from slot `offset` on.
    template <class F>
    void each_page(const Segment& segment, int64_t begin, int64_t count, F f) const {
        const int32_t* pages = args.pages + segment.page_begin;
        begin += segment.start % args.page_size;
        int64_t page = begin / args.page_size, offset = begin % args.page_size;
        for (int64_t i = 0, end; i < count; ++page, offset = 0, i = end) {
            const int64_t left = args.page_size - offset;
            end = i + (left < count - i ? left : count - i);
            f(pages[page], offset, i, end);
        }
    }

    void locate(const PagedCache& cache, const Segment& segment, int64_t begin, int64_t count,
                const void** to) const {
        const char* base = static_cast<const char*>(cache.data) + head_begin * cache.head_stride * element;
        each_page(segment, begin, count, [&](int64_t page, int64_t offset, int64_t i, int64_t end) {
            const char* p = base + (page * cache.page_stride + offset * cache.token_stride) * element;
            for (; i < end; ++i, p += cache.token_stride * element) to[i] = p;
        });
    }

    template <KvFormat kFormat>
    void dequantize(int64_t count) const {
        dequantize<kFormat>(args.k, args.k_scales, scratch.k_codes, scratch.k_plain, scratch.k_rows, count);
        dequantize<kFormat>(args.v, args.v_scales, scratch.v_codes, scratch.v_plain, scratch.v_rows, count);
    }
    // Inlined, it makes GCC 12's code for the products of plain caches a fifth slower.
    template <KvFormat kFormat>
    [[gnu::noinline]] void dequantize(const PagedCache& cache, KvScales scales, const void* const* codes,
                                      float* plain, const void** rows, int64_t count) const {
        const int64_t offset = (kv_head - head_begin) * cache.head_stride, dim = args.head_dim;
        const int64_t heads = args.num_kv_heads, *slots = scratch.slots;
        T* row = reinterpret_cast<T*>(plain);
        for (int64_t i = 0; i < count; ++i, row += scratch.dim_pad) {
            dequantize_head<kFormat>(static_cast<const char*>(codes[i]) + offset, dim, scales,
                                     slots[i] * heads + kv_head, row);
            rows[i] = row;
        }
    }

    // The scales of a page are one or a few cache lines, which are fetched at once.
    void prefetch_scales(const Segment& segment, int64_t begin, int64_t count) const {
        const f16* arrays[] = {args.k_scales.scale, args.v_scales.scale, args.k_scales.zero,
                               args.v_scales.zero};
        constexpr int64_t kLine = 64 / sizeof(f16);
        each_page(segment, begin, count, [&](int64_t page, int64_t offset, int64_t i, int64_t end) {
            const int64_t first = (page * args.page_size + offset) * args.num_kv_heads;
            const int64_t last = first + (end - i) * args.num_kv_heads - 1;
            for (const f16* array : arrays) {
                if (!array) continue;
                for (int64_t at = first; at < last; at += kLine) __builtin_prefetch(array + at, 0, 2);
                __builtin_prefetch(array + last, 0, 2);
            }
        });
    }
};

// Scores are compared and exponentiated in units of log2. Without a softcap and with a positive scale, raw
// scores can be compared, and the factor is applied within the exponent.
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
