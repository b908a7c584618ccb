// The common part of all ways to run a segment: its lanes, the keys that they see, their queries, and merging
// of their states, with lanes along the vector. tree_attention_tiles.h and tree_attention_amx.h are for many
// lanes; they differ in how they pack and multiply a block. tree_attention_rows.h is for few lanes.
#pragma once

#include "tree_attention_item.h"

TTS_BEGIN_ISA

// ---- rows of elements ------------------------------------------------------------------------------------

// Copies a row in the form in which it is multiplied (floats or pairs), with zeros up to whole vectors.
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

template <class T>
inline bool is_finite(T x) {
    return to_float(x) - to_float(x) == 0.0f;
}

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

#if defined(__AVX512BF16__)
// Each pair (bfloat16 of even, bfloat16 of odd) in the place of a float.
inline void store_pairs(Vec even, Vec odd, float* to) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}
#endif

// ---- a segment's lanes -----------------------------------------------------------------------------------

template <class T>
class Lanes {
  protected:
    static constexpr int W = Vec::width;

    Lanes(Item<T>& item, const Segment& segment)
        : item_(item),
          s_(item.scratch),
          dim_(item.args.head_dim),
          segment_(segment),
          first_lane_(item.first_lane(segment)),
          lanes_(item.num_lanes(segment)),
          map_{item.args.scale, item.args.softcap} {}

    // Fills `visible` for each lane; returns the keys that at least one row sees.
    Visible find_visible() const {
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

    // Whether all lanes [lane, end) see all keys of [begin, begin + count), or none of them sees any.
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

    // Number of floats in a query or key in the form in which it is multiplied.
    int64_t row_stride() const { return kPairs<T> ? s_.dim_pad / 2 : s_.dim_pad; }

    // Transposes queries of the current head for lanes [begin, end) of the item. Steps [k, k + W) of W lanes
    // from `lane` on go to to(lane, k), [W][W], with a stride between rows.
    template <class To>
    void pack_queries(int64_t begin, int64_t end, int64_t stride, To to) const {
        for (int64_t lane = begin; lane < end; lane += W) {
            item_.each_query(lane, lane + W < end ? lane + W : end, [&](int64_t l, const T* q) {
                copy_row(q, s_.stage + (l - lane) * row_stride(), dim_);
            });
            for (int64_t k = 0; k < num_steps<T>(dim_); k += W) {
                transpose(s_.stage + k, row_stride(), to(lane, k), stride);
            }
        }
    }

    // ---- scores [key][lane] of kVecs vectors of lanes ----

    template <int kVecs>
    void map_scores(float* scores, int64_t count) const {
        for (int64_t i = 0; i < count * kVecs * W; i += W) map_(Vec::load(scores + i)).store(scores + i);
    }

    // Sets scores to -inf where the lane must not see the key.
    template <int kVecs>
    void hide_scores(float* scores, int64_t lane, int64_t begin, int64_t count) const {
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
                float* p = scores + (key * kVecs + v) * W;
                const Vec k = Vec::all(static_cast<float>(key));
                const Vec x = select_less(k, high, Vec::load(p), hidden);
                select_less(low, k, x, hidden).store(p);
            }
        }
    }

    // ---- merging states: vector `i` of the lanes in hand ----

    // Sets `max` and `sum` to those of the merged states. Stores the factors of the rows in old_weight_ and
    // block_weight_, and returns the former.
    Vec merge_states(float* max_of, float* sum_of, Vec block, Vec block_sum, int64_t i) {
        const Vec old = Vec::load(max_of), top = max(block, old), base = finite_top(top);
        const Vec a = exp2(old - base), b = exp2(block - base);
        top.store(max_of);
        (a * Vec::load(sum_of) + b * block_sum).store(sum_of);
        a.store(old_weight_ + i * W);
        b.store(block_weight_ + i * W);
        return a;
    }

    // ---- values that are not finite, in a block that some lane sees in part only ----
    // 0 * NaN must not reach that lane.

    // Returns whether all values of the block are finite. Calls hide(key, element) for the others, which must
    // become 0 in the packed block.
    template <class Hide>
    bool make_clean(int64_t count, Hide hide) const {
        bool clean = true;
        for (int64_t i = 0; i < count; ++i) {
            const T* value = item_.value(i);
            if (all_finite(value, dim_)) continue;
            clean = false;
            for (int64_t d = 0; d < dim_; ++d) {
                if (!is_finite(value[d])) hide(i, d);
            }
        }
        return clean;
    }

    // Adds weight * value for the values that make_clean removed, to the lanes in [lane, lane + width) that
    // see them. These values are infinities and NaN, so the order of sums does not matter. weight(key, l) and
    // row(l, element) belong to lane + l.
    template <class Weight, class Row>
    void add_not_finite(int64_t lane, int64_t width, int64_t begin, int64_t count, Weight weight,
                        Row row) const {
        for (int64_t i = 0; i < count; ++i) {
            const T* value = item_.value(i);
            if (all_finite(value, dim_)) continue;
            for (int64_t l = 0; l < width; ++l) {
                const Visible v = s_.visible[lane + l];
                if (begin + i < v.begin || begin + i >= v.end) continue;
                const float p = weight(i, l) * block_weight_[l];
                for (int64_t d = 0; d < dim_; ++d) {
                    if (!is_finite(value[d])) row(l, d) += p * to_float(value[d]);
                }
            }
        }
    }

    Item<T>& item_;
    const Scratch& s_;
    const int64_t dim_;
    const Segment& segment_;
    const int64_t first_lane_, lanes_;
    const ScoreMap map_;
    bool clean_ = true;  // whether no value of the block has to be hidden from a lane
    alignas(64) float old_weight_[kTileVecs * W], block_weight_[kTileVecs * W];  // of the lanes in hand
};

TTS_END_ISA
