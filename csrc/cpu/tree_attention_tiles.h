// Runs a segment for many lanes: tiles of lanes x blocks of keys, with lanes along the vector.
//
//   scores[key][lane] = sum_d  K[key][d] * Q[d][lane]
//   row[d][lane]      = sum_key V[key][d] * P[key][lane]
//
// Both products use the same micro-kernel: a broadcast element of K or V (stored as in the cache, row by row)
// times a vector of lanes. Only Q is transposed, once for each item. The softmax runs down the columns, and
// each lane is independent, so nothing is reduced across a vector. With pairs of bfloat16, the summed index
// advances by two: rows of K and Q already contain pairs, rows of V and P are interleaved with the next row.
#pragma once

#include "tree_attention_lanes.h"

TTS_BEGIN_ISA

// ---- micro-kernel ----------------------------------------------------------------------------------------

// finish(sum_k a[i * a_row + k * a_step] * b[k][lane], place of c[i][lane], vector of lanes) for i < rows
// (rounded up to kLaneTileRows).
template <bool kIsPairs, int kVecs, class Finish>
inline void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_stride,
                     int64_t steps, float* c, int64_t c_stride, int64_t rows, KeyPrefetch& prefetch,
                     Finish finish) {
    constexpr int W = Vec::width, R = kLaneTileRows;
    for (int64_t i = 0; i < rows; i += R, a += R * a_row, c += R * c_stride) {
        prefetch.step();
        Chains<R * kVecs> sums;
        const float *ak = a, *bk = b;
        for (int64_t k = 0; k < steps; ++k, ak += a_step, bk += b_stride) {
            sums.link(k);
            Vec lanes[kVecs];
#pragma GCC unroll 3
            for (int v = 0; v < kVecs; ++v) lanes[v] = Vec::load(bk + v * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec x = Vec::all(ak[r * a_row]);
#pragma GCC unroll 3
                for (int v = 0; v < kVecs; ++v) {
                    sums.acc[r * kVecs + v] = mac<kIsPairs>(x, lanes[v], sums.acc[r * kVecs + v]);
                }
            }
        }
        sums.finish();
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
            for (int v = 0; v < kVecs; ++v) finish(sums.total(r * kVecs + v), c + r * c_stride + v * W, v);
        }
    }
}

// ---- packing ---------------------------------------------------------------------------------------------

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

// ---- one segment -----------------------------------------------------------------------------------------

template <class T>
class Tiles : Lanes<T> {
  public:
    Tiles(Item<T>& item, const Segment& segment) : Lanes<T>(item, segment) {}

    void run() {
        if (item_.packed_head != item_.kv_head) {
            pack_queries(0, item_.lanes, s_.lanes_pad,
                         [&](int64_t lane, int64_t k) { return s_.q_pack + k * s_.lanes_pad + lane; });
        }
        item_.packed_head = item_.kv_head;
        item_.begin(segment_);
        load_states();
        const Visible all = find_visible();
        for (int64_t begin = block_floor(all.begin); begin < all.end; begin += kKeyBlock) {
            const int64_t left = all.end - begin;
            run_block(begin, left < kKeyBlock ? left : kKeyBlock);
        }
        store_states();
    }

  private:
    using Base = Lanes<T>;
    using Base::block_weight_, Base::clean_, Base::dim_, Base::first_lane_, Base::item_, Base::lanes_;
    using Base::find_visible, Base::pack_queries, Base::row_stride, Base::view;
    using Base::map_, Base::old_weight_, Base::s_, Base::segment_, Base::W;
    using typename Base::View;

    // Processes keys [begin, begin + count) for all lanes of the segment, in tiles of nearly equal width.
    void run_block(int64_t begin, int64_t count) {
        const int64_t vecs = divide_up(lanes_, W), tiles = divide_up(vecs, kTileVecs);
        item_.locate(segment_, begin, count);
        item_.dequantize(count);
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
        for (int64_t i = 0; i < count; ++i) copy_row(item_.key(i), s_.k_block + i * row_stride(), dim_);
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
        if (seen.none) return;
        multiply<kPairs<T>, kVecs>(s_.k_block, /* a_row */ row_stride(), /* a_step */ 1,
                                   s_.q_pack + first_lane_ + lane, s_.lanes_pad, num_steps<T>(dim_),
                                   s_.scores, kVecs * W, count, item_.prefetch,
                                   [](Vec sum, float* to, int) { sum.store(to); });
        if (!map_.deferred()) Base::template map_scores<kVecs>(s_.scores, count);
        if (!seen.all) Base::template hide_scores<kVecs>(s_.scores, lane, begin, count);
        bool grew = false;
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) grew |= softmax<kVecs>(lane, v, count);
        const auto merge_values = [&](auto finish) {
            multiply<kPairs<T>, kVecs>(s_.v_block, /* a_row */ 1, /* a_step */ s_.dim_pad, s_.scores,
                                       kVecs * W, num_steps<T>(count), s_.tile_row + lane, s_.lanes_pad, dim_,
                                       item_.prefetch, finish);
        };
        if (grew) {
            merge_values([this](Vec sum, float* to, int v) {
                merge_rows(Vec::load(to), Vec::load(old_weight_ + v * W), sum,
                           Vec::load(block_weight_ + v * W))
                    .store(to);
            });
        } else {  // a factor of 1: the same bits
            merge_values([this](Vec sum, float* to, int v) {
                fma(sum, Vec::load(block_weight_ + v * W), Vec::load(to)).store(to);
            });
        }
        if (!clean_) add_not_finite<kVecs>(lane, width, begin, count);
    }

    // For one vector of lanes: replaces scores by weights relative to the largest score of the block. Sets
    // tile_max and tile_sum to those of the merged states, stores the weights of both states in old_weight_
    // and block_weight_, and returns whether any of old_weight_ is not 1. Weights are summed as one vector of
    // W keys after another, then over the vector by halves, in the same order as a sum along the keys.
    template <int kVecs>
    bool softmax(int64_t lane, int v, int64_t count) {
        constexpr int64_t stride = kVecs * W;
        float *scores = s_.scores + v * W, *tile_max = s_.tile_max + lane + v * W,
              *tile_sum = s_.tile_sum + lane + v * W;
        const Vec f = Vec::all(map_.factor());
        Vec m0 = Vec::all(-kInfinity), m1 = m0;
        int64_t key = 0;
        for (; key + 2 <= count; key += 2) {
            m0 = max(Vec::load(scores + key * stride), m0);  // NaN: max gives its second argument
            m1 = max(Vec::load(scores + (key + 1) * stride), m1);
        }
        if (key < count) m0 = max(Vec::load(scores + key * stride), m0);
        const Vec block = max(m0, m1) * f, shift = Vec::zero() - finite_top(block);
        Vec sums[W];
        for (Vec& sum : sums) sum = Vec::zero();
        const auto weight = [&](int64_t k) {
            const Vec p = weight_of_score<T>(fma(Vec::load(scores + k * stride), f, shift));
            sums[k % W] = sums[k % W] + p;
            return p;
        };
#if defined(__AVX512BF16__)
        if constexpr (kPairs<T>) {
            for (key = 0; key + 2 <= count; key += 2) {
                const Vec even = weight(key), odd = weight(key + 1);
                store_pairs(even, odd, scores + key / 2 * stride);
            }
            if (key < count) store_pairs(weight(key), Vec::zero(), scores + key / 2 * stride);
        }
#endif
        if constexpr (!kPairs<T>) {
            for (key = 0; key < count; ++key) weight(key).store(scores + key * stride);
        }
        for (int half = W / 2; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
        }
        const Vec a = Base::merge_states(tile_max, tile_sum, block, sums[0], v);
        return reduce_max(select_less(a, Vec::all(1.0f), Vec::all(1.0f), Vec::zero())) > 0.0f;
    }

    const T* value(int64_t i) const { return item_.value(i); }

    bool make_clean(int64_t count) {
        return Base::make_clean(count, [&](int64_t i, int64_t d) {
            if constexpr (kPairs<T>) {
                char* pair = reinterpret_cast<char*>(s_.v_block + i / 2 * s_.dim_pad + d);
                __builtin_memset(pair + i % 2 * 2, 0, 2);
            } else {
                s_.v_block[i * s_.dim_pad + d] = 0.0f;
            }
        });
    }

    template <int kVecs>
    void add_not_finite(int64_t lane, int64_t width, int64_t begin, int64_t count) {
        Base::add_not_finite(
            lane, width, begin, count, [&](int64_t i, int64_t l) { return weight_of(i, l, kVecs * W); },
            [&](int64_t l, int64_t d) -> float& { return s_.tile_row[d * s_.lanes_pad + lane + l]; });
    }

    float weight_of(int64_t i, int64_t l, int64_t stride) const {
        if constexpr (!kPairs<T>) return s_.scores[i * stride + l];
        bf16 p;
        __builtin_memcpy(&p, reinterpret_cast<const char*>(s_.scores + i / 2 * stride + l) + i % 2 * 2, 2);
        return to_float(p);
    }

    // ---- the states of the segment's lanes, transposed ----

    void load_states() {
        for (int64_t lane = 0; lane < s_.lanes_pad; ++lane) {
            s_.tile_max[lane] = -kInfinity, s_.tile_sum[lane] = 0.0f;
        }
        for (int64_t lane = 0; lane < lanes_; lane += W) {
            const int64_t count = lanes_ - lane < W ? lanes_ - lane : W;
            if (segment_.fresh) {
                for (int64_t d = 0; d < dim_; ++d) Vec::zero().store(s_.tile_row + d * s_.lanes_pad + lane);
                continue;
            }
            for (int64_t i = 0; i < count; ++i) {
                const StateRef from = item_.state(segment_, first_lane_ + lane + i);
                s_.tile_max[lane + i] = from.state.max, s_.tile_sum[lane + i] = from.state.sum;
                for (int64_t d = 0; d < dim_; d += W)
                    Vec::load(from.row + d).store(s_.stage + i * s_.dim_pad + d);
            }
            for (int64_t d = 0; d < dim_; d += W) {
                transpose(s_.stage + d, s_.dim_pad, s_.tile_row + d * s_.lanes_pad + lane, s_.lanes_pad);
            }
        }
    }

    void store_states() {
        for (int64_t lane = 0; lane < lanes_; lane += W) {
            for (int64_t d = 0; d < dim_; d += W) {
                transpose(s_.tile_row + d * s_.lanes_pad + lane, s_.lanes_pad, s_.stage + d, s_.dim_pad);
            }
            for (int64_t i = 0; i < W && lane + i < lanes_; ++i) {
                const StateRef to = item_.state(segment_, first_lane_ + lane + i);
                to.state = {s_.tile_max[lane + i], s_.tile_sum[lane + i]};
                for (int64_t d = 0; d < dim_; d += W)
                    Vec::load(s_.stage + i * s_.dim_pad + d).store(to.row + d);
            }
        }
    }
};

TTS_END_ISA
