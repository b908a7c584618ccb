// A segment read by many lanes: tiles of lanes x blocks of keys, lanes along the vector.
//
//   scores[key][lane]    = sum_d  K[key][d] * Q[d][lane]
//   tile_row[d][lane]   += sum_key V[key][d] * P[key][lane]
//
// Both products are one micro-kernel: a broadcast element of K or V (kept as the cache has it, row by row)
// times a vector of lanes. Only Q is transposed, once an item; the softmax runs down the columns, a lane to
// itself, so nothing is reduced across a vector. With pairs of bfloat16 the summed index goes two at a time:
// K and Q rows are pairs as they lie, rows of V and P are interleaved with the next.
#pragma once

#include "tree_attention_item.h"

TTS_BEGIN_ISA

// ---- micro-kernel
// ----------------------------------------------------------------------------------------------

#if defined(__FMA__)
inline constexpr int64_t kLaneChain = INT64_MAX;
#else
inline constexpr int64_t kLaneChain =
    8;  // products that are summed one after the other, each sum rounded twice
#endif

// c[i][lane] = start + sum_k a[i * a_row + k * a_step] * b[k][lane] for i < rows (rounded up to
// kLaneTileRows), start = 0, or c where `accumulate`, times factor[lane] if there is one.
template <bool kIsPairs, int kVecs>
inline void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_stride,
                     int64_t steps, float* c, int64_t c_stride, int64_t rows, bool accumulate,
                     const float* factor, KeyPrefetch& prefetch) {
    constexpr int W = Vec::width, R = kLaneTileRows;
    for (int64_t i = 0; i < rows; i += R, a += R * a_row, c += R * c_stride) {
        prefetch.step();
        const float *ak = a, *bk = b;
        for (int64_t k = 0; k < steps;) {
            const int64_t begin = k, end = steps - k < kLaneChain ? steps : k + kLaneChain;
            Vec acc[R][kVecs];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
                for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec::zero();
            }
            for (; k < end; ++k, ak += a_step, bk += b_stride) {
                Vec lanes[kVecs];
#pragma GCC unroll 3
                for (int v = 0; v < kVecs; ++v) lanes[v] = Vec::load(bk + v * W);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const Vec x = Vec::all(ak[r * a_row]);
#pragma GCC unroll 3
                    for (int v = 0; v < kVecs; ++v) acc[r][v] = mac<kIsPairs>(x, lanes[v], acc[r][v]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
                for (int v = 0; v < kVecs; ++v) {
                    float* to = c + r * c_stride + v * W;
                    const Vec x = acc[r][v];
                    if (begin > 0 || (accumulate && !factor)) {
                        (Vec::load(to) + x).store(to);
                    } else if (accumulate) {
                        fma(Vec::load(to), Vec::load(factor + v * W), x).store(to);
                    } else {
                        x.store(to);
                    }
                }
            }
        }
    }
}

// ---- packing
// ---------------------------------------------------------------------------------------------------

// to = the row as it is multiplied, zeros up to whole vectors: floats, or pairs as they lie.
template <class T>
inline void copy_row(const T* from, float* to, int64_t n) {
    constexpr int W = Vec::width;
    int64_t i = 0;
#if defined(__AVX512BF16__)
    if constexpr (kPairs<T>) {
        for (; i + 32 <= n; i += 32, to += 16) _mm512_storeu_si512(to, _mm512_loadu_si512(from + i));
        if (i < n) {
            const __mmask32 mask = (1u << (n - i)) - 1u;
            _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(mask, from + i));
        }
        return;
    }
#endif
    for (; i + W <= n; i += W) Vec::load(from + i).store(to + i);
    if (i < n) Vec::load(from + i, static_cast<int>(n - i)).store(to + i);
}

#if defined(__AVX512BF16__)
// to[d] = (a[d], b[d]) for d < n, zeros up to whole vectors; no b: zeros in its place.
inline void interleave_rows(const bf16* a, const bf16* b, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i += 32) {
        const __mmask32 mask = n - i >= 32 ? ~0u : (1u << (n - i)) - 1u;
        const __m512i x = _mm512_maskz_loadu_epi16(mask, a + i);
        const __m512i y = b ? _mm512_maskz_loadu_epi16(mask, b + i) : _mm512_setzero_si512();
        const Pairs pairs = interleave(x, y);
        _mm512_storeu_si512(to + i, pairs.low);
        _mm512_storeu_si512(to + i + 16, pairs.high);
    }
}
#endif

template <class T>
inline bool all_finite(const T* x, int64_t n) {
    constexpr int W = Vec::width;
    Vec sum = Vec::zero();  // x - x is 0, or NaN for an infinity or a NaN
    for (int64_t i = 0; i < n; i += W) {
        const Vec v = n - i >= W ? Vec::load(x + i) : Vec::load(x + i, static_cast<int>(n - i));
        sum = sum + (v - v);
    }
    return reduce_add(sum) == 0.0f;
}

// ---- one segment
// -----------------------------------------------------------------------------------------------

template <class T>
class Tiles {
  public:
    Tiles(Item<T>& item, const Segment& segment)
        : item_(item),
          s_(item.scratch),
          dim_(item.args.head_dim),
          steps_(kPairs<T> ? (dim_ + 1) / 2 : dim_),
          segment_(segment),
          first_lane_((segment.row_begin - item.task.row_begin) * item.group),
          lanes_((segment.row_end - segment.row_begin) * item.group),
          map_{item.args.scale, item.args.softcap} {}

    void run() {
        if (item_.packed_head != item_.kv_head) pack_queries();
        item_.packed_head = item_.kv_head;
        const Visible all = find_visible();
        for (int64_t lane = 0; lane < s_.lanes_pad; ++lane)
            s_.tile_max[lane] = -kInfinity, s_.tile_sum[lane] = 0.0f;
        begun_ = false;
        for (int64_t begin = all.begin; begin < all.end; begin += kKeyBlock) {
            const int64_t left = all.end - begin;
            run_block(begin, left < kKeyBlock ? left : kKeyBlock);
            begun_ = true;
        }
        if (begun_) add_to_state();
    }

  private:
    static constexpr int W = Vec::width;
    static constexpr float kLeeway = 8.0f;

    // q_pack[step][lane] for every lane of the item.
    void pack_queries() {
        const int64_t stride = kPairs<T> ? s_.dim_pad / 2 : s_.dim_pad;
        for (int64_t lane = 0; lane < item_.lanes; lane += W) {
            const int64_t end = lane + W < item_.lanes ? lane + W : item_.lanes;
            item_.each_query(
                lane, end, [&](int64_t l, const T* q) { copy_row(q, s_.stage + (l - lane) * stride, dim_); });
            for (int64_t k = 0; k < steps_; k += W) {
                transpose(s_.stage + k, stride, s_.q_pack + k * s_.lanes_pad + lane, s_.lanes_pad);
            }
        }
    }

    // Fills `visible` for each lane; the keys that any row sees.
    Visible find_visible() {
        Visible all{segment_.length, 0};
        for (int64_t row = segment_.row_begin; row < segment_.row_end; ++row) {
            const Visible v = item_.visible(segment_, row);
            const int64_t lane = (row - segment_.row_begin) * item_.group;
            for (int64_t g = 0; g < item_.group; ++g) s_.visible[lane + g] = v;
            if (v.begin == v.end) continue;
            if (v.begin < all.begin) all.begin = v.begin;
            if (v.end > all.end) all.end = v.end;
        }
        return all;
    }

    // Whether all lanes [lane, end) see all keys of [begin, begin + count), or none of them does.
    struct View {
        bool all, none;
    };
    View view(int64_t lane, int64_t end, int64_t begin, int64_t count) const {
        View view{true, true};
        for (; lane < end; ++lane) {
            const Visible v = s_.visible[lane];
            view.all &= v.begin <= begin && v.end >= begin + count;
            view.none &= v.begin >= begin + count || v.end <= begin;
        }
        return view;
    }

    // Keys [begin, begin + count) for all lanes of the segment, in tiles of nearly equal width.
    void run_block(int64_t begin, int64_t count) {
        const int64_t vecs = divide_up(lanes_, W), tiles = divide_up(vecs, kTileVecs);
        item_.locate(segment_, begin, count);
        item_.look_ahead(segment_, begin + count, tiles * (row_groups(count) + row_groups(dim_)));
        pack_keys(count);
        pack_values(count);
        clean_ = view(0, lanes_, begin, count).all || make_clean(count);
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t lane = t * vecs / tiles * W, width = (t + 1) * vecs / tiles - t * vecs / tiles;
            if (width == 1) run_tile<1>(lane, begin, count);
            if (width == 2) run_tile<2>(lane, begin, count);
            if (width == 3) run_tile<3>(lane, begin, count);
        }
    }

    static int64_t row_groups(int64_t rows) { return divide_up(rows, kLaneTileRows); }

    void pack_keys(int64_t count) {
        const int64_t stride = kPairs<T> ? s_.dim_pad / 2 : s_.dim_pad;
        for (int64_t i = 0; i < count; ++i) copy_row(item_.key(i), s_.k_block + i * stride, dim_);
    }

    void pack_values(int64_t count) {
#if defined(__AVX512BF16__)
        if constexpr (kPairs<T>) {
            for (int64_t i = 0; i < count; i += 2) {
                interleave_rows(value(i), i + 1 < count ? value(i + 1) : nullptr,
                                s_.v_block + i / 2 * s_.dim_pad, dim_);
            }
            return;
        }
#endif
        for (int64_t i = 0; i < count; ++i) copy_row(value(i), s_.v_block + i * s_.dim_pad, dim_);
    }

    template <int kVecs>
    void run_tile(int64_t lane, int64_t begin, int64_t count) {
        const int64_t width = lanes_ - lane < kVecs * W ? lanes_ - lane : kVecs * W;
        const View seen = view(lane, lane + width, begin, count);
        float* c = s_.tile_row + lane;
        if (seen.none && begun_) return;
        multiply<kPairs<T>, kVecs>(s_.k_block, /* a_row */ kPairs<T> ? s_.dim_pad / 2 : s_.dim_pad,
                                   /* a_step */ 1, s_.q_pack + first_lane_ + lane, s_.lanes_pad, steps_,
                                   s_.scores, kVecs * W, count,
                                   /* accumulate */ false, nullptr, item_.prefetch);
        const bool deferred = seen.all && map_.deferred();
        if (!deferred) finish_scores<kVecs>(lane, begin, count);
        bool grew = false;
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) {
            grew |= softmax<kVecs>(lane + v * W, s_.scores + v * W, count, deferred ? map_.factor() : 1.0f,
                                   v * W);
        }
        multiply<kPairs<T>, kVecs>(s_.v_block, /* a_row */ 1, /* a_step */ s_.dim_pad, s_.scores, kVecs * W,
                                   kPairs<T> ? (count + 1) / 2 : count, c, s_.lanes_pad, dim_, begun_,
                                   begun_ && grew ? factors_ : nullptr, item_.prefetch);
        if (!clean_) add_not_finite<kVecs>(lane, width, begin, count);
    }

    // Scores in units of log2, -inf where the lane must not see the key.
    template <int kVecs>
    void finish_scores(int64_t lane, int64_t begin, int64_t count) {
        for (int v = 0; v < kVecs; ++v) {
            float first[W], last[W];  // of the block's keys, as floats: small whole numbers
            for (int i = 0; i < W; ++i) {
                const int64_t l = lane + v * W + i;
                const Visible seen = l < lanes_ ? s_.visible[l] : Visible{begin, begin + count};
                const int64_t low = seen.begin - begin, high = seen.end - begin;
                first[i] = static_cast<float>(low < 0 ? 0 : low > count ? count : low) - 0.5f;
                last[i] = static_cast<float>(high < 0 ? 0 : high > count ? count : high) - 0.5f;
            }
            const Vec low = Vec::load(first), high = Vec::load(last), hidden = Vec::all(-kInfinity);
            for (int64_t key = 0; key < count; ++key) {
                float* p = s_.scores + key * kVecs * W + v * W;
                const Vec k = Vec::all(static_cast<float>(key));
                const Vec x = select_less(k, high, map_(Vec::load(p)), hidden);
                select_less(low, k, x, hidden).store(p);
            }
        }
    }

    // One vector of lanes: scores -> weights in place, tile_max and tile_sum brought up to date. Leaves in
    // factors_ what the lanes' rows must be multiplied by; returns whether any of it is not 1. tile_max
    // follows the largest score only where that is far above it: weights up to 2**kLeeway do no harm, and
    // most blocks leave the rows as they are.
    template <int kVecs>
    bool softmax(int64_t lane, float* scores, int64_t count, float factor, int64_t at) {
        constexpr int64_t stride = kVecs * W;
        const Vec old = Vec::load(s_.tile_max + lane), f = Vec::all(factor);
        Vec m0 = Vec::all(-kInfinity), m1 = m0;
        int64_t key = 0;
        for (; key + 2 <= count; key += 2) {
            m0 = max(Vec::load(scores + key * stride), m0);  // NaN: max gives its second argument
            m1 = max(Vec::load(scores + (key + 1) * stride), m1);
        }
        if (key < count) m0 = max(Vec::load(scores + key * stride), m0);
        const Vec now = max(m0, m1) * f;
        const Vec top = select_less(old + Vec::all(kLeeway), now, now, old);
        const Vec shift = Vec::zero() - finite_top(top);
        const Vec decay = exp2(old + shift);
        Vec sum = Vec::zero();
        const auto weight = [&](int64_t k) {
            const Vec p = weight_of_score<T>(fma(Vec::load(scores + k * stride), f, shift));
            sum = sum + p;
            return p;
        };
        if constexpr (kPairs<T>) {
            for (key = 0; key + 2 <= count; key += 2) {
                const Vec even = weight(key), odd = weight(key + 1);
                store_pairs(even, odd, scores + key / 2 * stride);
            }
            if (key < count) store_pairs(weight(key), Vec::zero(), scores + key / 2 * stride);
        } else {
            for (key = 0; key < count; ++key) weight(key).store(scores + key * stride);
        }
        top.store(s_.tile_max + lane);
        fma(Vec::load(s_.tile_sum + lane), decay, sum).store(s_.tile_sum + lane);
        decay.store(factors_ + at);
        return reduce_max(select_less(decay, Vec::all(1.0f), Vec::all(1.0f), Vec::zero())) > 0.0f;
    }

    // A float's place each: (bfloat16 of even, bfloat16 of odd).
    static void store_pairs([[maybe_unused]] Vec even, [[maybe_unused]] Vec odd, [[maybe_unused]] float* to) {
#if defined(__AVX512BF16__)
        alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
#endif
    }

    // ---- values that are not finite, in a block that some lane sees in part only: 0 * NaN must not reach
    // that lane ----

    const T* value(int64_t i) const { return item_.value(i); }

    static bool is_finite(T x) { return to_float(x) - to_float(x) == 0.0f; }

    // Whether the block's values are all finite; those that are not become 0 in the packed block.
    bool make_clean(int64_t count) {
        bool clean = true;
        for (int64_t i = 0; i < count; ++i) {
            if (all_finite(value(i), dim_)) continue;
            clean = false;
            for (int64_t d = 0; d < dim_; ++d) {
                if (is_finite(value(i)[d])) continue;
                if constexpr (kPairs<T>) {
                    char* pair = reinterpret_cast<char*>(s_.v_block + i / 2 * s_.dim_pad + d);
                    __builtin_memset(pair + i % 2 * 2, 0, 2);
                } else {
                    s_.v_block[i * s_.dim_pad + d] = 0.0f;
                }
            }
        }
        return clean;
    }

    // Adds weight * value for the values that make_clean took out, to the lanes that see them.
    template <int kVecs>
    void add_not_finite(int64_t lane, int64_t width, int64_t begin, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            if (all_finite(value(i), dim_)) continue;
            for (int64_t l = 0; l < width; ++l) {
                const Visible v = s_.visible[lane + l];
                if (begin + i < v.begin || begin + i >= v.end) continue;
                const float p = weight_of(i, l, kVecs * W);
                for (int64_t d = 0; d < dim_; ++d) {
                    if (!is_finite(value(i)[d]))
                        s_.tile_row[d * s_.lanes_pad + lane + l] += p * to_float(value(i)[d]);
                }
            }
        }
    }

    float weight_of(int64_t i, int64_t l, int64_t stride) const {
        if constexpr (!kPairs<T>) return s_.scores[i * stride + l];
        bf16 p;
        __builtin_memcpy(&p, reinterpret_cast<const char*>(s_.scores + i / 2 * stride + l) + i % 2 * 2, 2);
        return to_float(p);
    }

    // ---- the end of the segment: the transposed state joins the item's
    // --------------------------------------------

    void add_to_state() {
        const int64_t stride = s_.dim_pad;
        for (int64_t lane = 0; lane < lanes_; lane += W) {
            for (int64_t d = 0; d < dim_; d += W) {
                transpose(s_.tile_row + d * s_.lanes_pad + lane, s_.lanes_pad, s_.stage + d, stride);
            }
            for (int64_t i = 0; i < W && lane + i < lanes_; ++i) {
                const SoftmaxState seen{s_.tile_max[lane + i], s_.tile_sum[lane + i]};
                merge_row(first_lane_ + lane + i, seen, s_.stage + i * stride);
            }
        }
    }

    void merge_row(int64_t lane, SoftmaxState seen, const float* from) {
        if (seen.empty()) return;
        SoftmaxState& state = item_.state(lane);
        const MergeWeights w = merge(state, seen);
        float* to = item_.row(lane);
        const Vec a = Vec::all(w.a), b = Vec::all(w.b);
        const bool first = state.empty();
        for (int64_t d = 0; d < dim_; d += W) {
            const Vec x = Vec::load(from + d) * b;
            (first ? x : fma(Vec::load(to + d), a, x)).store(to + d);
        }
        state = w.state;
    }

    Item<T>& item_;
    const Scratch& s_;
    const int64_t dim_, steps_;
    const Segment& segment_;
    const int64_t first_lane_, lanes_;
    const ScoreMap map_;
    bool begun_ = false, clean_ = true;
    float factors_[kTileVecs * W];
};

TTS_END_ISA
