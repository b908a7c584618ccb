// tree_attention in plain float32 arithmetic, for float32 caches and for head sizes that tensor cores do not
// support.
//
// A block of four warps runs a task for one KV head. It processes kRows lanes for each warp at a time, and 64
// keys (a block of plan.h) at a time:
//
//   s[r] = q[r] . k     a thread has two keys and all lanes of its warp. K is copied through shared memory,
//                       32 keys and 64 elements of each at a time, converted to float32 (rows of 65 elements
//                       avoid bank conflicts)
//   b[r] = p v          a thread has every 32nd element of D; V is read from memory, coalesced
//
// The queries and the chunks' sums of weighted values for the block's lanes stay in shared memory: 8 bytes x
// 4 kRows x D. Hidden keys are skipped, so the content of their slots has no effect. Quantised heads (kCodes)
// are decoded to q's type when they are read: keys once for all rows of a tile, values once for each of its
// warps.
#pragma once

#include "quantized_kv.cuh"
#include "tree_attention_item.cuh"

namespace tts::cuda {

struct FmaShape {
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
    static constexpr int kKeys = kWarp, kSlice = 64, kSliceStride = kSlice + 1;

    // Bytes of shared memory of a block with `rows` lanes for each warp.
    static constexpr int64_t shared(int rows, int64_t head_dim) {
        return 4 * (kKeys * kSliceStride + 2 * kWarps * rows * head_dim);
    }
};

// Lanes [first, first + 4 * kRows) of an item; warp w has kRows of them.
template <class T, int kRows, bool kCodes>
class FmaTile {
    using Shape = FmaShape;
    static constexpr int kLanes = Shape::kWarps * kRows, kKeys = Shape::kKeys, kSlice = Shape::kSlice;
    static constexpr int kHalves = kKeyBlock / kKeys;

  public:
    __device__ FmaTile(const TreeAttentionLaunch& launch, const Item& item, int first, float* shared)
        : args_(item.args),
          item_(item),
          dim_(static_cast<int>(item.args.head_dim)),
          first_(first + warp() * kRows),
          count_(max(0, min(kRows, item.lanes() - first_))),
          row_begin_(item.row(first)),
          row_end_(item.row(min(first + kLanes, item.lanes()) - 1) + 1),
          slice_(shared),
          q_(shared + kKeys * Shape::kSliceStride + warp() * kRows * dim_),
          chunk_rows_(q_ + kLanes * dim_),
          own_rows_(launch.own + (int64_t{blockIdx.x} * kHalfLanes + warp() * kRows) * dim_),
          map_(item.args) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            row_[r] = r < count_ ? item.row(first_ + r) : -1;
            position_[r] = r < count_ ? args_.positions[row_[r]] : 0;
            target_[r] = kNone, has_own_[r] = false;
        }
    }

    __device__ void run() {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            for (int d = lane(); d < dim_; d += kWarp) {
                q_[r * dim_ + d] = r < count_ ? to_float(item_.template query<T>(first_ + r)[d]) : 0.0f;
            }
        }
        for (int i = item_.task.seg_begin; i < item_.task.seg_end; ++i) {
            const Segment segment = args_.segments[i];
            begin_segment(segment);
            const SeenRange view(args_, segment, row_begin_, row_end_);
            for (int begin = view.begin; begin < view.end; begin += kKeyBlock) {
                run_keys(segment, begin, min(kKeyBlock, view.end - begin));
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) finish(r);
        __syncthreads();
    }

  private:
    // Keys [begin, begin + count) of a segment. This thread has keys lane() and lane() + 32.
    __device__ void run_keys(const Segment& segment, int begin, int count) {
        float p[kHalves][kRows];
        uint32_t seen[kHalves][kRows];  // by each lane of the warp: bit k is key k of the half
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const int left = count - half * kKeys, first = begin + half * kKeys;
            const int key = first + min(lane(), max(left, 1) - 1);
            if (left > 0) score(p[half], head_row(args_.k, args_.k_scales, segment, key), min(left, kKeys));
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const Range range = visible(args_, segment, row_[r], position_[r]);
                const bool sees = lane() < left && key >= range.begin && key < range.end;
                seen[half][r] = __ballot_sync(kAllLanes, sees);
                p[half][r] = !sees ? -infinity() : map_.deferred() ? p[half][r] : map_(p[half][r]);
            }
        }
        accumulate(p, seen, segment, begin, count);
    }

    // This head's row of a token, with its scale and zero.
    struct HeadRow {
        int64_t offset;
        KvNumbers numbers;

        // The row of another lane of the warp.
        __device__ HeadRow of_lane(int other) const {
            HeadRow row{__shfl_sync(kAllLanes, offset, other), {}};
            if constexpr (kCodes) {
                row.numbers = {__shfl_sync(kAllLanes, numbers.scale, other),
                               __shfl_sync(kAllLanes, numbers.zero, other)};
            }
            return row;
        }
    };

    __device__ HeadRow head_row(const PagedCache& cache, const KvScales& beside, const Segment& segment,
                                int position) const {
        const Place token = item_.place(segment, position);
        HeadRow row{item_.offset(cache, token), {}};
        if constexpr (kCodes) {
            const int64_t number = item_.number(token);
            row.numbers = {beside.scale ? to_float(beside.scale[number]) : 0.0f,
                           beside.zero ? to_float(beside.zero[number]) : 0.0f};
        }
        return row;
    }

    // Element d of a row.
    __device__ float read(const PagedCache& cache, const HeadRow& row, int d) const {
        if constexpr (kCodes) {
            return element<T>(static_cast<const uint8_t*>(cache.data) + row.offset, d, dim_, args_.format,
                              row.numbers);
        } else {
            return to_float(static_cast<const T*>(cache.data)[row.offset + d]);
        }
    }

    // Scores of one of `count` keys, whose row this thread has, for all lanes of its warp.
    __device__ void score(float (&s)[kRows], const HeadRow& key, int count) {
        const float* mine = slice_ + min(lane(), count - 1) * Shape::kSliceStride;
#pragma unroll
        for (int r = 0; r < kRows; ++r) s[r] = 0.0f;
        for (int begin = 0; begin < dim_; begin += kSlice) {
            const int width = min(kSlice, dim_ - begin);
            __syncthreads();
            for (int row = warp(); row < kKeys; row += Shape::kWarps) {
                const HeadRow from = key.of_lane(row);
                float* to = slice_ + row * Shape::kSliceStride;
#pragma unroll
                for (int d = lane(); d < kSlice; d += kWarp) {
                    if (row < count && d < width) to[d] = read(args_.k, from, begin + d);
                }
            }
            __syncthreads();
            float sum[kRows] = {}, odd[kRows] = {};  // two sums of half as many terms have less rounding
            for (int d = 0; d + 1 < width; d += 2) {
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    sum[r] = fmaf(mine[d], q_[r * dim_ + begin + d], sum[r]);
                    odd[r] = fmaf(mine[d + 1], q_[r * dim_ + begin + d + 1], odd[r]);
                }
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (width % 2) sum[r] = fmaf(mine[width - 1], q_[r * dim_ + begin + width - 1], sum[r]);
                s[r] += sum[r] + odd[r];
            }
        }
    }

    // The block's softmax, its sums b = p v, and their merge into the chunk; p contains scores.
    __device__ void accumulate(float (&p)[kHalves][kRows], const uint32_t (&seen)[kHalves][kRows],
                               const Segment& segment, int begin, int count) {
        HeadRow values[kHalves];
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const int key = min(half * kKeys + lane(), count - 1);
            values[half] = head_row(args_.v, args_.v_scales, segment, begin + key);
        }
        SoftmaxState state[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) state[r] = soften(r, p);
        for (int first = 0; first < dim_; first += kWarp) {
            const int d = first + lane();
            float sum[kRows] = {};
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                for (int key = 0; key < min(kKeys, count - half * kKeys); ++key) {
                    const HeadRow row = values[half].of_lane(key);
                    const float x = d < dim_ ? read(args_.v, row, d) : 0.0f;
#pragma unroll
                    for (int r = 0; r < kRows; ++r) {
                        const float weight = __shfl_sync(kAllLanes, p[half][r], key);
                        if (seen[half][r] >> key & 1) sum[r] = fmaf(weight, x, sum[r]);
                    }
                }
            }
            if (d >= dim_) continue;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (target_[r] == kNone) continue;
                float& of_chunk = chunk_rows_[r * dim_ + d];
                of_chunk = Merge(chunk_[r], state[r])(of_chunk, sum[r]);
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) chunk_[r] = Merge(chunk_[r], state[r]).state;
    }

    // Replaces lane r's scores by weights; returns the block's state.
    __device__ SoftmaxState soften(int r, float (&p)[kHalves][kRows]) const {
        const float factor = map_.factor();
        const float top = reduce_lanes(fmaxf(p[0][r], p[1][r]), Highest());
        const float max = scaled(top, factor), shift = finite_top(max);
        float sum = 0.0f;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            p[half][r] = exp2_fast(fmaf(p[half][r], factor, -shift));
            sum += p[half][r];
        }
        return {max, reduce_lanes(sum, Add())};
    }

    struct Highest {
        __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
    };

    // ---- the states of chunks, and of the task ------------------------------------------------------------

    // Begins the states that begin with a segment, and stores the lanes' previous states.
    __device__ void begin_segment(const Segment& segment) {
        if (!segment.fresh) return;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (row_[r] < segment.row_begin || row_[r] >= segment.row_end) continue;
            put_away(r);
            chunk_[r] = {};
            for (int d = lane(); d < dim_; d += kWarp) chunk_rows_[r * dim_ + d] = 0.0f;
            target_[r] = segment.slot < 0 ? kOwn : segment.slot + row_[r] - segment.row_begin;
        }
    }

    __device__ void put_away(int r) {
        if (target_[r] == kOwn) {
            take_own(r);
            for (int d = lane(); d < dim_; d += kWarp) own_rows_[r * dim_ + d] = chunk_rows_[r * dim_ + d];
            own_[r] = chunk_[r], has_own_[r] = true;
        } else if (target_[r] != kNone) {
            write_slot(target_[r], r);
        }
    }

    // Merges the task's own state and the chunk; the result replaces the chunk.
    __device__ void take_own(int r) {
        if (!has_own_[r]) return;
        const Merge merged(own_[r], chunk_[r]);
        for (int d = lane(); d < dim_; d += kWarp) {
            float& x = chunk_rows_[r * dim_ + d];
            x = merged(own_rows_[r * dim_ + d], x);
        }
        chunk_[r] = merged.state;
    }

    __device__ void write_slot(int64_t slot, int r) const {
        const int head = item_.head(first_ + r);
        float* to = slot_row(args_, slot, head);
        for (int d = lane(); d < dim_; d += kWarp) to[d] = chunk_rows_[r * dim_ + d];
        if (lane() == 0) *slot_state(args_, slot, head) = {chunk_[r].max, chunk_[r].sum};
    }

    // Stores a result, or the first state of a row that the second launch merges.
    __device__ void finish(int r) {
        if (target_[r] == kNone) return;
        if (target_[r] != kOwn) {
            write_slot(target_[r], r);
            if (!has_own_[r]) return;
            chunk_[r] = {};
        }
        take_own(r);
        if (is_merged(args_, row_[r])) {
            return write_slot(int64_t{item_.task.slot} + row_[r] - item_.task.row_begin, r);
        }
        const int head = item_.head(first_ + r);
        const int64_t index = int64_t{args_.rows[row_[r]]} * args_.num_q_heads + head;
        const Result result(args_, head, chunk_[r]);
        T* out = static_cast<T*>(args_.out) + index * args_.head_dim;
        for (int d = lane(); d < dim_; d += kWarp) {
            out[d] = from_float<T>(result(chunk_rows_[r * dim_ + d]));
        }
        if (lane() == 0) args_.lse[index] = result.lse;
    }

    const TreeAttentionArgs& args_;
    const Item& item_;
    const int dim_, first_, count_;                      // the warp's lanes
    const int row_begin_, row_end_;                      // of the whole tile
    float *const slice_, *const q_, *const chunk_rows_;  // [kKeys, kSliceStride]; [kRows, D] of the warp
    float* const own_rows_;                              // the same, in global memory
    const ScoreMap map_;
    int row_[kRows], position_[kRows];  // -1: no row
    SoftmaxState chunk_[kRows], own_[kRows];
    int target_[kRows];  // of the chunk
    bool has_own_[kRows];
};

template <class T, int kRows, bool kCodes>
__global__ void __launch_bounds__(FmaShape::kThreads, kCodes ? 2 : 3)
    tree_attention_fma(const __grid_constant__ TreeAttentionLaunch launch) {
    extern __shared__ __align__(16) float floats[];
    const auto heads = static_cast<unsigned>(launch.args.num_kv_heads);
    const unsigned items = launch.sizes->tasks * heads;
    for (unsigned index = blockIdx.x; index < items; index += gridDim.x) {
        const Item item(launch.args, index / heads, index % heads);
        for (int first = 0; first < item.lanes(); first += FmaShape::kWarps * kRows) {
            FmaTile<T, kRows, kCodes>(launch, item, first, floats).run();
        }
    }
}

}  // namespace tts::cuda
