// Runs a segment for few lanes (a branch's private tail: one row, the heads of a group). Keys are read in
// place.
//
//   scores[lane][key] = dot(Q[lane], K[key])          K transposed in registers, once for all lanes
//   row[lane][d]      = sum_key P[lane][key] * V[key][d]
//
// Every sum is the same as in the tiles (tree_attention_tiles.h), product by product, so the result does not
// depend on how many lanes read a segment. A score is one chain over the head's elements, with keys along the
// vector. A weighted value is one chain over the keys of the block, with elements along the vector. Lanes
// that see the same keys of a block are processed together, up to four at a time.
#pragma once

#include "tree_attention_columns.h"
#include "tree_attention_lanes.h"

TTS_BEGIN_ISA

template <class T>
class Rows : Lanes<T> {
  public:
    Rows(Item<T>& item, const Segment& segment)
        : Lanes<T>(item, segment), steps_(num_steps<T>(dim_)), stride_(Lanes<T>::row_stride()) {}

    // Processes every head of the item in turn over a block of keys: together they read whole tokens.
    void run() {
        const int64_t heads = item_.heads();
        for (int64_t h = 0; h < heads; ++h) {
            item_.select(item_.head_begin + h);
            item_.begin(segment_);
            float* rows = queries(h);
            item_.each_query(first_lane_, first_lane_ + lanes_, [&](int64_t l, const T* q) {
                copy_row(q, rows + (l - first_lane_) * stride_, dim_);
            });
        }
        const Visible seen = Lanes<T>::find_visible();
        for (int64_t begin = block_floor(seen.begin); begin < seen.end; begin += kKeyBlock) {
            const int64_t left = seen.end - begin, count = left < kKeyBlock ? left : kKeyBlock;
            item_.locate(segment_, begin, count);
            item_.look_ahead(segment_, begin + count, heads * steps_of_prefetch(count));
            for (int64_t h = 0; h < heads; ++h) {
                item_.select(item_.head_begin + h);
                item_.dequantize(count);
                run_block(queries(h), begin, count);
            }
        }
    }

  private:
    using Lanes<T>::dim_, Lanes<T>::first_lane_, Lanes<T>::item_, Lanes<T>::lanes_;
    using Lanes<T>::map_, Lanes<T>::s_, Lanes<T>::segment_, Lanes<T>::W;

    static constexpr int64_t kChunk = kPairs<T> ? 2 * W : W;  // elements of a row in one vector
    static constexpr int64_t kKeyStep = kPairs<T> ? 2 : 1;    // keys that are multiplied at once
    static constexpr int kRowVecs = 4;                        // vectors of a row in registers

    float* queries(int64_t h) const { return s_.q_rows + h * kNarrow * stride_; }

    // About how many times a head's block calls prefetch.step().
    int64_t steps_of_prefetch(int64_t count) const {
        const int64_t packs = lanes_ / 4 + lanes_ % 4 / 2 + lanes_ % 2;
        const int64_t passes = (dim_ + kRowVecs * W - 1) / (kRowVecs * W);
        const int64_t loads = divide_up(lanes_, 4) * divide_up(count, W) * (dim_ / KeyColumns<T>::kElements);
        return packs * passes * divide_up(count, kKeyStep) + loads;
    }

    void run_block(const float* q, int64_t begin, int64_t count) {
        int64_t i = 0;
        for (; i + 4 <= lanes_; i += 4) find_scores<4>(q + i * stride_, s_.scores + i * kKeyBlock, count);
        const float* rest = q + i * stride_;
        float* scores = s_.scores + i * kKeyBlock;
        if (lanes_ - i == 3) find_scores<3>(rest, scores, count);
        if (lanes_ - i == 2) find_scores<2>(rest, scores, count);
        if (lanes_ - i == 1) find_scores<1>(rest, scores, count);
        const int64_t rows = segment_.row_end - segment_.row_begin;
        for (int64_t row = 0, end; row < rows; row = end) {
            const Visible seen = seen_in_block(row, begin, count);
            for (end = row + 1; end < rows && seen_in_block(end, begin, count) == seen;) ++end;
            if (seen.begin < seen.end) add_block(row * item_.group, end * item_.group, seen, count);
        }
    }

    // The keys of the block at `begin` that a row sees, counted from `begin`.
    Visible seen_in_block(int64_t row, int64_t begin, int64_t count) const {
        const Visible v = s_.visible[row * item_.group];
        const int64_t low = v.begin > begin ? v.begin - begin : 0, high = v.end - begin;
        const int64_t end = high < count ? high : count;
        return low < end ? Visible{low, end} : Visible{0, 0};
    }

    void add_block(int64_t lane, int64_t end, Visible seen, int64_t count) {
        for (; lane + 4 <= end; lane += 4) add_lanes<4>(lane, seen, count);
        for (; lane + 2 <= end; lane += 2) add_lanes<2>(lane, seen, count);
        for (; lane < end; ++lane) add_lanes<1>(lane, seen, count);
    }

    template <int kLanes>
    void add_lanes(int64_t lane, Visible seen, int64_t count) {
        float *scores[kLanes], *rows[kLanes];
        MergeWeights weights[kLanes];
        for (int l = 0; l < kLanes; ++l) {
            scores[l] = s_.scores + (lane + l) * kKeyBlock;
            const SoftmaxState block = softmax(scores[l], seen, count);
            const StateRef to = item_.state(segment_, first_lane_ + lane + l);
            weights[l] = merge(to.state, block);
            to.state = weights[l].state;
            rows[l] = to.row;
        }
        for (int64_t d = 0; d < dim_; d += kRowVecs * W) {
            const int64_t left = dim_ - d, n = left < kRowVecs * W ? left : kRowVecs * W;
            add_values<kLanes, kRowVecs>(rows, scores, weights, d, n, seen);
        }
    }

    // ---- scores ----

    // scores[lane][key] of `kLanes` lanes, W keys at a time, or 2 W if few lanes would leave the adders idle.
    template <int kLanes>
    void find_scores(const float* q, float* scores, int64_t count) {
        constexpr int kGroups = kLanes <= 2 ? 2 : 1;
        for (int64_t first = 0; first < count; first += kGroups * W) {
            const T* keys[kGroups * W];
            for (int i = 0; i < kGroups * W; ++i) {
                keys[i] = item_.key(first + i < count ? first + i : count - 1);
            }
            Chains<kLanes * kGroups> sums;
            int64_t step = 0, d = 0;
            for (; d + KeyColumns<T>::kElements <= dim_; d += KeyColumns<T>::kElements) {
                item_.prefetch.step();
#pragma GCC unroll 2
                for (int g = 0; g < kGroups; ++g) {
                    Vec columns[KeyColumns<T>::kSteps];
                    KeyColumns<T>::load(keys + g * W, d, columns);
#pragma GCC unroll 16
                    for (int i = 0; i < KeyColumns<T>::kSteps; ++i) {
#pragma GCC unroll 4
                        for (int l = 0; l < kLanes; ++l) {
                            Vec& sum = sums.acc[g * kLanes + l];
                            sum = mac<kPairs<T>>(Vec::all(q[l * stride_ + step + i]), columns[i], sum);
                        }
                    }
                }
                step += KeyColumns<T>::kSteps;
                sums.link(step);
            }
            if (d < dim_) add_last_columns<kLanes, kGroups>(q, keys, d, step, sums);
            sums.finish();
#pragma GCC unroll 8
            for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 4
                for (int l = 0; l < kLanes; ++l) {
                    sums.total(g * kLanes + l).store(scores + l * kKeyBlock + first + g * W);
                }
            }
        }
    }

    // If there are fewer elements than a load reads, they are first copied, with zeros after them.
    template <int kLanes, int kGroups>
    void add_last_columns(const float* q, const T* const* keys, int64_t d, int64_t step,
                          Chains<kLanes * kGroups>& sums) {
        const auto bytes = static_cast<uint64_t>(dim_ - d) * sizeof(T);
        for (int g = 0; g < kGroups; ++g) {
            T last[W][KeyColumns<T>::kElements] = {};
            const T* rows[W];
            for (int i = 0; i < W; ++i) {
                __builtin_memcpy(last[i], keys[g * W + i] + d, bytes);
                rows[i] = last[i];
            }
            Vec columns[KeyColumns<T>::kSteps];
            KeyColumns<T>::load(rows, 0, columns);
            for (int64_t i = 0; step + i < steps_; ++i) {
                for (int l = 0; l < kLanes; ++l) {
                    Vec& sum = sums.acc[g * kLanes + l];
                    sum = mac<kPairs<T>>(Vec::all(q[l * stride_ + step + i]), columns[i], sum);
                }
            }
        }
    }

    // ---- weights ----

    // Replaces scores by weights (in the form in which they are multiplied), 0 for hidden keys; returns the
    // block's state.
    SoftmaxState softmax(float* scores, Visible seen, int64_t count) {
        const bool masked = seen.begin > 0 || seen.end < round_up(count, W);
        const float factor = map_.factor();
        const Vec low = Vec::all(static_cast<float>(seen.begin) - 0.5f),
                  high = Vec::all(static_cast<float>(seen.end) - 0.5f), hidden = Vec::all(-kInfinity);
        Vec top = hidden;
        for (int64_t i = 0; i < count; i += W) {
            Vec x = Vec::load(scores + i);
            if (!map_.deferred()) x = map_(x);
            if (masked) {
                const Vec key = Vec::all(static_cast<float>(i)) + Vec::load(kCount);
                x = select_less(key, high, x, hidden);
                x = select_less(low, key, x, hidden);
            }
            if (masked || !map_.deferred()) x.store(scores + i);
            top = max(x, top);  // NaN: max gives its second argument
        }
        const float block = reduce_max(top) * factor, shift = block == -kInfinity ? 0.0f : 0.0f - block;
        Vec sum = Vec::zero();
        for (int64_t i = 0; i < count; i += W) {
            const Vec p = weight_of_score<T>(fma(Vec::load(scores + i), Vec::all(factor), Vec::all(shift)));
            sum = sum + p;
            store_weights(p, scores, i);
        }
        return {block, reduce_add(sum)};
    }

    static constexpr float kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

    static void store_weights(Vec p, float* weights, int64_t i) {
#if defined(__AVX512BF16__)
        if constexpr (kPairs<T>) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i / 2),
                                (__m256i)_mm512_cvtneps_pbh(p.v));
            return;
        }
#endif
        p.store(weights + i);
    }

    // ---- values ----

    // row[lane][d : d + n] = merge(row, sum_key weight * V[key][d : d + n]), n <= kVecs * W.
    template <int kLanes, int kVecs>
    void add_values(float* const* rows, float* const* scores, const MergeWeights* weights, int64_t d,
                    int64_t n, Visible seen) {
        Chains<kLanes * kVecs> sums;
        if (n == kVecs * W) {
            sum_values<kLanes, kVecs>(sums, scores, d, seen, [](const T* p, int) { return load(p); });
        } else {
            sum_values<kLanes, kVecs>(sums, scores, d, seen, [n](const T* p, int v) {
                const int64_t left = n - v * kChunk;
                return left >= kChunk ? load(p) : left > 0 ? load(p, left) : Vec::zero();
            });
        }
        sums.finish();
#pragma GCC unroll 4
        for (int l = 0; l < kLanes; ++l) {
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) {
                if (v * W >= n) break;
                float* to = rows[l] + d + v * W;
                merge_rows(Vec::load(to), Vec::all(weights[l].a), sums.total(l * kVecs + v),
                           Vec::all(weights[l].b))
                    .store(to);
            }
        }
    }

    template <int kLanes, int kVecs, class Load>
    void sum_values(Chains<kLanes * kVecs>& sums, float* const* scores, int64_t d, Visible seen,
                    Load load_at) {
        for (int64_t i = seen.begin / kKeyStep * kKeyStep; i < seen.end; i += kKeyStep) {
            item_.prefetch.step();
            Vec values[kVecs];
            load_values<kVecs>(values, i, d, seen, load_at);
#pragma GCC unroll 4
            for (int l = 0; l < kLanes; ++l) {
                const Vec p = Vec::all(scores[l][i / kKeyStep]);
#pragma GCC unroll 4
                for (int v = 0; v < kVecs; ++v) {
                    sums.acc[l * kVecs + v] = mac<kPairs<T>>(p, values[v], sums.acc[l * kVecs + v]);
                }
            }
            sums.link(i / kKeyStep + 1);
        }
    }

    // The values of key i, or of keys i and i + 1 interleaved element by element, with zeros for a hidden
    // key.
    template <int kVecs, class Load>
    void load_values(Vec* values, int64_t i, int64_t d, [[maybe_unused]] Visible seen, Load load_at) const {
#if defined(__AVX512BF16__)
        if constexpr (kPairs<T>) {
#pragma GCC unroll 2
            for (int v = 0; v < kVecs / 2; ++v) {
                const auto row = [&](int64_t key) {
                    if (key < seen.begin || key >= seen.end) return _mm512_setzero_si512();
                    return _mm512_castps_si512(load_at(item_.value(key) + d + v * kChunk, v).v);
                };
                const Pairs pairs = interleave(row(i), row(i + 1));
                values[2 * v] = {_mm512_castsi512_ps(pairs.low)};
                values[2 * v + 1] = {_mm512_castsi512_ps(pairs.high)};
            }
            return;
        }
#endif
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) values[v] = load_at(item_.value(i) + d + v * W, v);
    }

    // A vector of a row in the form in which it is multiplied. If n < kChunk: zeros after n elements.
    static Vec load(const T* p) {
#if defined(__AVX512BF16__)
        if constexpr (kPairs<T>) return {_mm512_loadu_ps(p)};
#endif
        return Vec::load(p);
    }
    static Vec load(const T* p, int64_t n) {
#if defined(__AVX512BF16__)
        if constexpr (kPairs<T>) {
            return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << n) - 1u, p))};
        }
#endif
        return Vec::load(p, static_cast<int>(n));
    }

    const int64_t steps_, stride_;
};

TTS_END_ISA
