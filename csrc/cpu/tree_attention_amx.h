// Runs a segment with AMX tiles in bfloat16: 16 lanes x the 64 keys of a block at a time, for any number of
// lanes.
//
//   scores[key][lane] = sum_d   K[key][d] * Q[d][lane]       rows: keys as they lie; weights: pairs of d
//   row[lane][d]      = sum_key P[lane][key] * V[key][d]     rows: P, transposed;    weights: pairs of keys
//
// Scores are stored as in tree_attention_tiles.h, with lanes along the vector: the softmax runs down the
// columns, and no key is transposed, which would be too expensive for few lanes. Only P is transposed, 4 KiB
// of pairs for 16 lanes. Rows of the states stay in place. A sum in a tile depends only on its own row and
// column, so few lanes (the rest of the tile is ignored) have the same bits as many.
#pragma once

#include "amx_tiles.h"
#include "tree_attention_lanes.h"

TTS_BEGIN_ISA

class AmxSegment : Lanes<bf16> {
  public:
    AmxSegment(Item<bf16>& item, const Segment& segment) : Lanes(item, segment) {}

    // Processes heads [begin, end) of the item in turn over a block of keys: together they read whole tokens.
    void run(int64_t head_begin, int64_t head_end) {
        const int64_t heads = head_end - head_begin;
        for (int64_t h = 0; h < heads; ++h) {
            item_.select(head_begin + h);
            item_.begin(segment_);
            pack_queries(queries(h));
        }
        const Visible all = find_visible();
        for (int64_t begin = block_floor(all.begin); begin < all.end; begin += kKeyBlock) {
            const int64_t left = all.end - begin, count = left < kKeyBlock ? left : kKeyBlock;
            item_.locate(segment_, begin, count);
            item_.look_ahead(segment_, begin + count, heads * steps_of_prefetch(count));
            for (int64_t h = 0; h < heads; ++h) {
                item_.select(head_begin + h);
                run_block(queries(h), begin, count);
            }
        }
    }

  private:
    static constexpr int64_t kKeyTiles = kKeyBlock / kTileLines;  // tiles of 16 keys
    static constexpr int64_t kPairTiles = kKeyBlock / 32;         // tiles of 16 pairs of keys

    // [16 lanes][pairs of elements][lane]. Each head of a narrow segment has as much memory as its q_rows.
    float* queries(int64_t h) const {
        return lanes_ > kNarrow ? s_.q_pack : s_.q_rows + h * kNarrow * s_.dim_pad;
    }
    const float* queries_of(const float* q, int64_t lane) const { return q + lane * s_.dim_pad / 2; }

    void pack_queries(float* to) const {
        Lanes::pack_queries(first_lane_, first_lane_ + lanes_, W, [&](int64_t lane, int64_t k) {
            return to + (lane - first_lane_) * row_stride() + k * W;
        });
    }

    // About how many times a head's block calls prefetch.step().
    int64_t steps_of_prefetch(int64_t count) const {
        const int64_t tiles = divide_up(lanes_, 2 * W);
        return count + divide_up(count, 2) * (1 + tiles) + (lanes_ <= W ? s_.dim_pad / 32 + 2 * lanes_ : 0);
    }

    // While the weights of some lanes are computed, the tiles compute the scores of the next.
    void run_block(const float* q, int64_t begin, int64_t count) {
        item_.dequantize(count);
        key_stride_ = lanes_ <= W ? stride_of_keys(count) : 0;
        if (key_stride_ == 0) pack_keys(count);
        pack_values(count);
        clean_ = view(0, lanes_, begin, count).all || make_clean(count);
        int64_t lane = next_seen(0, begin, count);
        if (lane < lanes_) find_scores(q, lane);
        while (lane < lanes_) {
            float* scores = scores_;
            const int64_t next = next_seen(lane + 2 * W, begin, count);
            scores_ = scores == score_rooms_[0] ? score_rooms_[1] : score_rooms_[0];
            if (next < lanes_) find_scores(q, next);
            float* const found = scores_;
            scores_ = scores, scores = found;
            ahead_ = reinterpret_cast<const char*>(queries_of(q, next + 2 * W));
            lanes_ - lane > W ? run_lanes<2>(lane, begin, count) : run_lanes<1>(lane, begin, count);
            scores_ = scores;
            lane = next;
        }
    }

    // The first group of lanes, from `lane` on, in which some lane sees keys of the block.
    int64_t next_seen(int64_t lane, int64_t begin, int64_t count) const {
        while (lane < lanes_ && view(lane, lane + width_at(lane), begin, count).none) lane += 2 * W;
        return lane;
    }
    int64_t width_at(int64_t lane) const { return lanes_ - lane < 2 * W ? lanes_ - lane : 2 * W; }

    void find_scores(const float* q, int64_t lane) {
        if (key_stride_ != 0) return find_scores_in_place(queries_of(q, lane));
        lanes_ - lane > W ? find_scores<2>(queries_of(q, lane)) : find_scores<1>(queries_of(q, lane));
    }

    // The distance of keys in bytes, if tiles of a whole block can be loaded directly, page by page; else 0.
    int64_t stride_of_keys(int64_t count) const {
        if (count < kKeyBlock || dim_ % 32 != 0) return 0;
        const auto at = [&](int64_t i) { return reinterpret_cast<const char*>(item_.key(i)); };
        const int64_t stride = at(1) - at(0);
        for (int64_t i = 1; i < kKeyBlock; ++i) {
            if (i % kTileLines != 0 && at(i) - at(i - 1) != stride) return 0;
        }
        return stride;
    }

    // Scores of one tile of lanes, with keys read in place.
    void find_scores_in_place(const float* q) {
        fence();
        zero_sums();
        const char* keys[kKeyTiles];
        for (int64_t i = 0; i < kKeyTiles; ++i)
            keys[i] = reinterpret_cast<const char*>(item_.key(i * kTileLines));
        for (int64_t d = 0; d < dim_; d += 32, q += W * W) {
            for (int i = 0; i < 4; ++i) item_.prefetch.step();
            _tile_loadd(6, q, kTileLine);
            _tile_loadd(4, keys[0] + 2 * d, key_stride_);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, keys[1] + 2 * d, key_stride_);
            _tile_dpbf16ps(1, 5, 6);
            _tile_loadd(4, keys[2] + 2 * d, key_stride_);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(5, keys[3] + 2 * d, key_stride_);
            _tile_dpbf16ps(3, 5, 6);
        }
        store_sums<64>(scores_);
    }

    // [32 elements][64 keys][32]
    void pack_keys(int64_t count) {
        auto* to = reinterpret_cast<char*>(s_.k_block);
        for (int64_t i = 0; i < count; ++i, to += kTileLine) {
            item_.prefetch.step();
            const bf16* key = item_.key(i);
            for (int64_t d = 0; d < dim_; d += 32) {
                _mm512_store_si512(to + d / 32 * kKeyTiles * kTileBytes, load_row(key, d));
            }
        }
    }

    __m512i load_row(const bf16* row, int64_t d) const {
        const int64_t left = dim_ - d;
        return _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : (1u << left) - 1u, row + d);
    }

    // [16 elements][32 pairs of keys][16][2]
    void pack_values(int64_t count) {
        auto* to = reinterpret_cast<char*>(s_.v_block);
        constexpr int64_t kPanel = kPairTiles * kTileBytes;
        for (int64_t i = 0; i < kKeyBlock; i += 2, to += kTileLine) {
            item_.prefetch.step();
            for (int64_t d = 0; d < dim_; d += 32) {
                const __m512i x = i < count ? load_row(item_.value(i), d) : _mm512_setzero_si512();
                const __m512i y = i + 1 < count ? load_row(item_.value(i + 1), d) : _mm512_setzero_si512();
                const Pairs pairs = interleave(x, y);
                _mm512_store_si512(to + d / 16 * kPanel, pairs.low);
                _mm512_store_si512(to + d / 16 * kPanel + kPanel, pairs.high);
            }
        }
    }

    template <int kVecs>
    void run_lanes(int64_t lane, int64_t begin, int64_t count) {
        const int64_t width = width_at(lane);
        find_states(lane, width);
        if (!map_.deferred()) map_scores<kVecs>(scores_, count);
        if (!view(lane, lane + width, begin, count).all) hide_scores<kVecs>(scores_, lane, begin, count);
        softmax<kVecs>(width, count);
        merge_blocks<kVecs>(width);
        add_values<kVecs>(width);
        if (!clean_) add_not_finite(lane, width, begin, count);
    }

    template <int kVecs>
    void find_scores(const float* q) {
        constexpr int kRows = 64 / kVecs;  // keys at once
        const int64_t apart = s_.dim_pad / 2 * W;
        fence();
        for (int64_t key = 0; key < kKeyBlock; key += kRows) {
            const char* keys = reinterpret_cast<const char*>(s_.k_block) + key * kTileLine;
            const float* step = q;
            zero_sums();
            for (int64_t d = 0; d < dim_; d += 32, keys += kKeyTiles * kTileBytes, step += W * W) {
                if constexpr (kVecs == 1) item_.prefetch.step();
                add_products<BFloat16Product, kRows>(keys, kTileBytes,
                                                     [&](int64_t panel) { return step + panel * apart; });
            }
            store_sums<kRows>(scores_ + key * kVecs * W);
        }
    }

    void find_states(int64_t lane, int64_t width) {
        const TreeAttentionArgs& args = item_.args;
        const int64_t group = item_.group, first = first_lane_ + lane;
        int64_t row = item_.row_of(first) - segment_.row_begin, g = first % group;
        for (int64_t i = 0; i < width; ++i) {
            const StateRef ref = segment_.slot < 0
                                     ? item_.chunk(first + i)
                                     : slot_ref(args, segment_.slot + row, item_.kv_head * group + g);
            states_[i] = &ref.state;
            rows_[i] = ref.row;
            if (++g == group) g = 0, ++row;
        }
    }

    // Converts scores to pairs of weights relative to the block's largest score, transposed; computes the
    // block's states.
    template <int kVecs>
    void softmax(int64_t width, int64_t count) {
        constexpr int64_t stride = kVecs * W;
        const Vec f = Vec::all(map_.factor());
        Vec top[kVecs][2], shift[kVecs], sum[kVecs][2];
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) top[v][0] = top[v][1] = Vec::all(-kInfinity);
        const auto more = [&](int64_t key, int half) {
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) {  // NaN: max gives its second argument
                top[v][half] = max(Vec::load(scores_ + key * stride + v * W), top[v][half]);
            }
        };
        int64_t key = 0;
        for (; key + 2 <= count; key += 2) more(key, 0), more(key + 1, 1);
        if (key < count) more(key, 0);
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
            const Vec block = max(top[v][0], top[v][1]) * f;
            block.store(block_max_ + v * W);
            shift[v] = Vec::zero() - finite_top(block);
            sum[v][0] = sum[v][1] = Vec::zero();
        }
        const auto weight = [&](int64_t k, int v) {
            return weight_of_score<bf16>(fma(Vec::load(scores_ + k * stride + v * W), f, shift[v]));
        };
        for (key = 0; key + 2 <= count; key += 2) {
            item_.prefetch.step();
            bring(key / 2, width);
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) {
                const Vec even = weight(key, v), odd = weight(key + 1, v);
                sum[v][0] = sum[v][0] + even, sum[v][1] = sum[v][1] + odd;
                store_pairs(even, odd, scores_ + key / 2 * stride + v * W);
            }
        }
        if (key < count) {
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) {
                const Vec even = weight(key, v);
                sum[v][0] = sum[v][0] + even;
                store_pairs(even, Vec::zero(), scores_ + key / 2 * stride + v * W);
            }
            key += 2;
        }
        for (; key < kKeyBlock; key += 2) {
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) Vec::zero().store(scores_ + key / 2 * stride + v * W);
        }
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
            (sum[v][0] + sum[v][1]).store(block_sum_ + v * W);
            for (int64_t s = 0; s < kPairTiles; ++s) {
                transpose(scores_ + s * W * stride + v * W, stride, p_ + (v * kPairTiles + s) * W * W, W);
            }
        }
    }

    // Prefetches to L1: a row of the current states, and some of the next queries.
    void bring(int64_t i, int64_t width) const {
        if (lanes_ <= W) return;
        if (i < width) {
            for (int64_t d = 0; d < dim_; d += W) __builtin_prefetch(rows_[i] + d, 1, 3);
        }
        const int64_t bytes = s_.dim_pad * 2;  // of 32 lanes, a 32nd part
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(ahead_ + i * bytes + at, 0, 3);
    }

    template <int kVecs>
    void merge_blocks(int64_t width) {
        alignas(64) float maxes[kVecs * W] = {}, sums[kVecs * W] = {};
        for (int64_t i = 0; i < width; ++i) maxes[i] = states_[i]->max, sums[i] = states_[i]->sum;
        for (int64_t i = 0; i < kVecs; ++i) {
            merge_states(maxes + i * W, sums + i * W, Vec::load(block_max_ + i * W),
                         Vec::load(block_sum_ + i * W), i);
        }
        for (int64_t i = 0; i < width; ++i) *states_[i] = {maxes[i], sums[i]};
    }

    template <int kVecs>
    void add_values(int64_t width) {
        constexpr int64_t kPanels = 4 / kVecs;
        const auto* values = reinterpret_cast<const char*>(s_.v_block);
        constexpr int64_t kPanel = kPairTiles * kTileBytes;
        for (int64_t d = 0; d < dim_; d += kPanels * W, values += kPanels * kPanel) {
            fence();
            zero_sums();
            for (int64_t s = 0; s < kPairTiles; ++s) {
                add_products<BFloat16Product, kVecs * W>(
                    p_ + s * W * W, kPairTiles * kTileBytes,
                    [&](int64_t panel) { return values + panel * kPanel + s * kTileBytes; });
            }
            store_sums<kVecs * W>(sums_);
            const int64_t left = divide_up(dim_ - d, W);
            left >= kPanels ? merge_values<kPanels>(width, d, kPanels)
                            : merge_values<kPanels>(width, d, left);
        }
    }

    template <int64_t kPanels>
    void merge_values(int64_t width, int64_t d, int64_t vecs) {
        for (int64_t i = 0; i < width; ++i) {
            const Vec a = Vec::all(old_weight_[i]), b = Vec::all(block_weight_[i]);
            if constexpr (kPanels == 4) item_.prefetch.step();
            const float* sum = sums_ + i * kPanels * W;
            float* row = rows_[i] + d;
            for (int64_t v = 0; v < vecs; ++v, sum += W, row += W) {
                merge_rows(Vec::load(row), a, Vec::load(sum), b).store(row);
            }
        }
    }

    bool make_clean(int64_t count) {
        auto* to = reinterpret_cast<bf16*>(s_.v_block);
        return Lanes::make_clean(count, [&](int64_t i, int64_t d) {
            to[((d / 16 * kPairTiles * 16 + i / 2) * 16 + d % 16) * 2 + i % 2] = bf16{0};
        });
    }

    void add_not_finite(int64_t lane, int64_t width, int64_t begin, int64_t count) {
        const auto* p = reinterpret_cast<const bf16*>(p_);
        const auto weight = [&](int64_t i, int64_t l) {
            return to_float(p[((l / W * kPairTiles + i / 32) * W + l % W) * 32 + i % 32]);
        };
        const auto element = [&](int64_t l, int64_t d) -> float& { return rows_[l][d]; };
        Lanes::add_not_finite(lane, width, begin, count, weight, element);
    }

    int64_t key_stride_ = 0;
    SoftmaxState* states_[2 * W];
    float* rows_[2 * W];
    const char* ahead_ = nullptr;
    alignas(64) float score_rooms_[2][kKeyBlock * 2 * W];
    float* scores_ = score_rooms_[0];             // [key][lane], then pairs of weights
    alignas(64) float p_[2 * kKeyBlock / 2 * W];  // [16 lanes][32 keys][lane][key]
    alignas(64) float sums_[kKeyBlock * W];       // [lane][panels of 16 elements]
    alignas(64) float block_max_[2 * W], block_sum_[2 * W];
};

TTS_END_ISA
