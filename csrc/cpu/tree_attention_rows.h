// A segment read by few lanes (a branch's private tail: one row, the heads of a group): unpacked, keys as
// they lie.
//
//   scores[lane][key] = dot(Q[lane], K[key])           K read once for up to four lanes
//   row[lane][d]     += sum_key P[lane][key] * V[key][d]
//
// Head elements run along the vector. Lanes that see the same keys go together, up to four at a time; a
// lane's range is trimmed to what it sees, so nothing is masked and hidden slots are never read.
#pragma once

#include "tree_attention_item.h"
#include "tree_attention_tiles.h"

TTS_BEGIN_ISA

template <class T>
class Rows {
  public:
    Rows(Item<T>& item, const Segment& segment)
        : item_(item),
          s_(item.scratch),
          dim_(item.args.head_dim),
          segment_(segment),
          map_{item.args.scale, item.args.softcap} {}

    void run() {
        const int64_t rows = segment_.row_end - segment_.row_begin, group = item_.group;
        for (int64_t row = 0, end; row < rows; row = end) {
            const Visible seen = item_.visible(segment_, segment_.row_begin + row);
            for (end = row + 1; end < rows && item_.visible(segment_, segment_.row_begin + end) == seen;)
                ++end;
            const int64_t base = (segment_.row_begin - item_.task.row_begin) * group;
            run_lanes(base + row * group, (end - row) * group, seen);
        }
    }

  private:
    static constexpr int W = Vec::width;
    static constexpr int64_t kChunk = kPairs<T> ? 2 * W : W;  // elements of a row in one vector
    static constexpr int64_t kKeyStep = kPairs<T> ? 2 : 1;    // keys that are multiplied at once
    static constexpr int kRowVecs = 4;                        // vectors of a row in registers

    // Every head of the item in turn over a block of keys: together they read whole tokens.
    void run_lanes(int64_t lane, int64_t lanes, Visible seen) {
        if (seen.begin == seen.end) return;
        const int64_t stride = kPairs<T> ? s_.dim_pad / 2 : s_.dim_pad, heads = item_.heads();
        for (int64_t h = 0; h < heads; ++h) {
            item_.select(item_.head_begin + h);
            float* rows = s_.q_rows + h * kNarrow * stride;
            item_.each_query(lane, lane + lanes,
                             [&](int64_t l, const T* q) { copy_row(q, rows + (l - lane) * stride, dim_); });
        }
        for (int64_t begin = seen.begin; begin < seen.end; begin += kKeyBlock) {
            const int64_t left = seen.end - begin, count = left < kKeyBlock ? left : kKeyBlock;
            item_.locate(segment_, begin, count);
            item_.look_ahead(segment_, begin + count, heads * steps(lanes, count));
            for (int64_t h = 0; h < heads; ++h) {
                item_.select(item_.head_begin + h);
                run_head(lane, lanes, s_.q_rows + h * kNarrow * stride, stride, count);
            }
        }
    }

    void run_head(int64_t lane, int64_t lanes, const float* q, int64_t stride, int64_t count) {
        int64_t i = 0;
        for (; i + 4 <= lanes; i += 4) run_block<4>(lane + i, q + i * stride, count);
        for (; i + 2 <= lanes; i += 2) run_block<2>(lane + i, q + i * stride, count);
        for (; i < lanes; ++i) run_block<1>(lane + i, q + i * stride, count);
    }

    // How often a head's block calls prefetch.step().
    int64_t steps(int64_t lanes, int64_t count) const {
        const int64_t packs = lanes / 4 + lanes % 4 / 2 + lanes % 2;
        const int64_t passes = (dim_ + kRowVecs * W - 1) / (kRowVecs * W);
        return packs * passes * divide_up(count, kKeyStep);
    }

    template <int kLanes>
    void run_block(int64_t lane, const float* q, int64_t count) {
        find_scores<kLanes>(q, count);
        float factors[kLanes];
        float* rows[kLanes];
        for (int l = 0; l < kLanes; ++l) {
            factors[l] = softmax(item_.state(lane + l), s_.scores + l * kKeyBlock, count);
            rows[l] = item_.row(lane + l);
        }
        for (int64_t d = 0; d < dim_; d += kRowVecs * W) {
            const int64_t left = dim_ - d, n = left < kRowVecs * W ? left : kRowVecs * W;
            add_values<kLanes, kRowVecs>(rows, d, n, factors, count);
        }
    }

    // A vector of a row as it is multiplied; n < kChunk: zeros behind n elements.
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

    // scores[lane][key], `W / kLanes` keys at a time: one accumulator a score, summed together at the end.
    template <int kLanes>
    void find_scores(const float* q, int64_t count) {
        constexpr int kKeys = W / kLanes < 1 ? 1 : W / kLanes;
        const int64_t stride = kPairs<T> ? s_.dim_pad / 2 : s_.dim_pad;
        for (int64_t first = 0; first < count; first += kKeys) {
            const T* keys[kKeys];
            for (int i = 0; i < kKeys; ++i) keys[i] = item_.key(first + i < count ? first + i : count - 1);
            Vec acc[kLanes * kKeys];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes * kKeys; ++i) acc[i] = Vec::zero();
            const auto step = [&](int64_t d, auto load_at) {
                const float* qd = q + (kPairs<T> ? d / 2 : d);
#pragma GCC unroll 16
                for (int i = 0; i < kKeys; ++i) {
                    const Vec k = load_at(keys[i] + d);
#pragma GCC unroll 4
                    for (int l = 0; l < kLanes; ++l) {
                        acc[l * kKeys + i] =
                            mac<kPairs<T>>(Vec::load(qd + l * stride), k, acc[l * kKeys + i]);
                    }
                }
            };
            int64_t d = 0;
            for (; d + kChunk <= dim_; d += kChunk) step(d, [](const T* p) { return load(p); });
            if (d < dim_) step(d, [rest = dim_ - d](const T* p) { return load(p, rest); });
            float sums[kLanes * kKeys];
            sum_each(acc).store(sums);
            for (int l = 0; l < kLanes; ++l) {
                __builtin_memcpy(s_.scores + l * kKeyBlock + first, sums + l * kKeys, sizeof(float) * kKeys);
            }
        }
    }

    // Scores -> weights (as they are multiplied) in place; returns what the lane's row must be multiplied by.
    float softmax(SoftmaxState& state, float* scores, int64_t count) {
        const int64_t whole = round_up(count, W);
        for (int64_t i = count; i < whole; ++i) scores[i] = -kInfinity;
        const SoftmaxState old = state;
        const float factor = map_.factor();
        Vec top = Vec::all(-kInfinity);
        for (int64_t i = 0; i < whole; i += W) {
            Vec x = Vec::load(scores + i);
            if (!map_.deferred()) {
                x = map_(x);
                x.store(scores + i);
            }
            top = max(x, top);
        }
        if (!map_.deferred()) {
            for (int64_t i = count; i < whole; ++i) scores[i] = -kInfinity;  // a softcap made them finite
            top = Vec::all(-kInfinity);
            for (int64_t i = 0; i < whole; i += W) top = max(Vec::load(scores + i), top);
        }
        const float block = reduce_max(top) * factor;
        state.max = block > old.max ? block : old.max;
        const float shift = state.max == -kInfinity ? 0.0f : -state.max;
        Vec sum = Vec::zero();
        for (int64_t i = 0; i < whole; i += W) {
            const Vec p = weight_of_score<T>(fma(Vec::load(scores + i), Vec::all(factor), Vec::all(shift)));
            sum = sum + p;
            store_weights(p, scores, i);
        }
        const float decay = old.empty() ? 0.0f : weight(old.max, state.max);
        state.sum = old.sum * decay + reduce_add(sum);
        return decay;
    }

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

    // row[lane][d : d + n] = row * factor + sum_key weight * V[key][d : d + n], n <= kVecs * W.
    template <int kLanes, int kVecs>
    void add_values(float* const* rows, int64_t d, int64_t n, const float* factors, int64_t count) {
        Vec acc[kLanes][kVecs];
#pragma GCC unroll 4
        for (int l = 0; l < kLanes; ++l) {
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) {
                const bool used = v * W < n && factors[l] != 0.0f;
                acc[l][v] = used ? Vec::load(rows[l] + d + v * W) * Vec::all(factors[l]) : Vec::zero();
            }
        }
        if (n == kVecs * W) {
            sum_values<kLanes, kVecs>(acc, d, count, [](const T* p, int) { return load(p); });
        } else {
            sum_values<kLanes, kVecs>(acc, d, count, [n](const T* p, int v) {
                const int64_t left = n - v * kChunk;
                return left >= kChunk ? load(p) : left > 0 ? load(p, left) : Vec::zero();
            });
        }
#pragma GCC unroll 4
        for (int l = 0; l < kLanes; ++l) {
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) {
                if (v * W < n) acc[l][v].store(rows[l] + d + v * W);
            }
        }
    }

    template <int kLanes, int kVecs, class Load>
    void sum_values(Vec (&acc)[kLanes][kVecs], int64_t d, int64_t count, Load load_at) {
#if defined(__AVX512BF16__)
        if constexpr (kPairs<T>) {
            sum_value_pairs<kLanes, kVecs>(acc, d, count, load_at);
            return;
        }
#endif
        for (int64_t i = 0; i < count; ++i) {
            item_.prefetch.step();
            Vec values[kVecs];
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) values[v] = load_at(item_.value(i) + d + v * W, v);
#pragma GCC unroll 4
            for (int l = 0; l < kLanes; ++l) {
                const Vec p = Vec::all(s_.scores[l * kKeyBlock + i]);
#pragma GCC unroll 4
                for (int v = 0; v < kVecs; ++v) acc[l][v] = fma(p, values[v], acc[l][v]);
            }
        }
    }

#if defined(__AVX512BF16__)
    // Two keys at a time: their rows are interleaved element by element.
    template <int kLanes, int kVecs, class Load>
    void sum_value_pairs(Vec (&acc)[kLanes][kVecs], int64_t d, int64_t count, Load load_at) {
        for (int64_t i = 0; i < count; i += 2) {
            item_.prefetch.step();
            Vec values[kVecs];
#pragma GCC unroll 2
            for (int v = 0; v < kVecs / 2; ++v) {
                const __m512i a = _mm512_castps_si512(load_at(item_.value(i) + d + v * kChunk, v).v);
                const __m512i b = i + 1 < count
                                      ? _mm512_castps_si512(load_at(item_.value(i + 1) + d + v * kChunk, v).v)
                                      : _mm512_setzero_si512();
                const Pairs pairs = interleave(a, b);
                values[2 * v] = {_mm512_castsi512_ps(pairs.low)};
                values[2 * v + 1] = {_mm512_castsi512_ps(pairs.high)};
            }
#pragma GCC unroll 4
            for (int l = 0; l < kLanes; ++l) {
                const Vec p = Vec::all(s_.scores[l * kKeyBlock + i / 2]);
#pragma GCC unroll 4
                for (int v = 0; v < kVecs; ++v) acc[l][v] = mac<true>(p, values[v], acc[l][v]);
            }
        }
    }
#endif

    Item<T>& item_;
    const Scratch& s_;
    const int64_t dim_;
    const Segment& segment_;
    const ScoreMap map_;
};

TTS_END_ISA
