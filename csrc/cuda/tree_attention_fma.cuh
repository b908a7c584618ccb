// tree_attention in plain float32 arithmetic: float32 caches, and head sizes that tensor cores do not take.
//
// A block of four warps runs a task for one KV head, kRows lanes a warp at a time, 32 keys at a time:
//
//   s[r] = q[r] . k     a thread has one key and all lanes of its warp; K comes through shared memory, 64
//                       elements of each key at a time, converted to float32 (rows of 65: no bank conflict)
//   o[r] += p v         a thread has every 32nd element of D; V is read from memory, coalesced
//
// Queries and sums of weighted values of the block's lanes stay in shared memory: 8 bytes x 4 kRows x D.
// Hidden keys are skipped, so what their slots hold never matters.
#pragma once

#include "tree_attention_item.cuh"

namespace tts::cuda {

struct FmaShape {
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
    static constexpr int kKeys = kWarp, kSlice = 64, kSliceStride = kSlice + 1;

    // Bytes of shared memory of a block with `rows` lanes a warp.
    static constexpr int64_t shared(int rows, int64_t head_dim) {
        return 4 * (kKeys * kSliceStride + 2 * kWarps * rows * head_dim);
    }
};

// Lanes [first, first + 4 * kRows) of an item; warp w has kRows of them.
template <class T, int kRows>
class FmaTile {
    using Shape = FmaShape;
    static constexpr int kLanes = Shape::kWarps * kRows, kKeys = Shape::kKeys, kSlice = Shape::kSlice;

  public:
    __device__ FmaTile(const Item& item, int first, float* shared)
        : args_(item.args),
          item_(item),
          dim_(static_cast<int>(item.args.head_dim)),
          first_(first + warp() * kRows),
          count_(max(0, min(kRows, item.lanes() - first_))),
          row_begin_(item.row(first)),
          row_end_(item.row(min(first + kLanes, item.lanes()) - 1) + 1),
          slice_(shared),
          q_(shared + kKeys * Shape::kSliceStride + warp() * kRows * dim_),
          out_(q_ + kLanes * dim_),
          map_(item.args) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            row_[r] = r < count_ ? item.row(first_ + r) : -1;
            position_[r] = r < count_ ? args_.positions[row_[r]] : 0;
            max_[r] = -infinity(), sum_[r] = 0.0f;
        }
    }

    __device__ void run() {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            for (int d = lane(); d < dim_; d += kWarp) {
                q_[r * dim_ + d] = r < count_ ? to_float(item_.template query<T>(first_ + r)[d]) : 0.0f;
                out_[r * dim_ + d] = 0.0f;
            }
        }
        for (int i = item_.task.seg_begin; i < item_.task.seg_end; ++i) {
            const Segment segment = args_.segments[i];
            const View view(args_, segment, row_begin_, row_end_);
            for (int begin = view.begin; begin < view.end; begin += kKeys) {
                run_keys(segment, begin, min(kKeys, view.end - begin));
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const SoftmaxState state{max_[r] * map_.factor(), reduce_lanes(sum_[r], Add())};
            if (r < count_)
                write_lane<T>(item_, first_ + r, state, [&](int d) { return out_[r * dim_ + d]; });
        }
        __syncthreads();
    }

  private:
    // Keys [begin, begin + count) of a segment; this thread's is key lane().
    __device__ void run_keys(const Segment& segment, int begin, int count) {
        const int key = begin + min(lane(), count - 1);
        float p[kRows];
        score(p, item_.offset(args_.k, segment, key), count);
        uint32_t seen[kRows];  // by each lane of the warp: bit k is key k
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const Range range = visible(args_, segment, row_[r], position_[r]);
            const bool sees = lane() < count && key >= range.begin && key < range.end;
            seen[r] = __ballot_sync(kAllLanes, sees);
            p[r] = sees ? map_.deferred() ? p[r] : map_(p[r]) : -infinity();
        }
        accumulate(p, seen, item_.offset(args_.v, segment, key), count);
    }

    // Scores of this thread's key, whose row is at `offset`, and all lanes of its warp.
    __device__ void score(float (&s)[kRows], int64_t offset, int count) {
        const T* k = static_cast<const T*>(args_.k.data);
        const float* mine = slice_ + min(lane(), count - 1) * Shape::kSliceStride;
#pragma unroll
        for (int r = 0; r < kRows; ++r) s[r] = 0.0f;
        for (int begin = 0; begin < dim_; begin += kSlice) {
            const int width = min(kSlice, dim_ - begin);
            __syncthreads();
            for (int row = warp(); row < kKeys; row += Shape::kWarps) {
                const T* from = k + __shfl_sync(kAllLanes, offset, row) + begin;
                float* to = slice_ + row * Shape::kSliceStride;
#pragma unroll
                for (int d = lane(); d < kSlice; d += kWarp) {
                    if (row < count && d < width) to[d] = to_float(from[d]);
                }
            }
            __syncthreads();
            float sum[kRows] = {}, odd[kRows] = {};  // two sums of half as many terms round less
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

    // The online softmax and o += p v; p holds scores of this thread's key, whose value is at `offset`.
    __device__ void accumulate(float (&p)[kRows], const uint32_t (&seen)[kRows], int64_t offset, int count) {
        float alpha[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) alpha[r] = soften(r, p[r]);
        const T* v = static_cast<const T*>(args_.v.data);
        for (int begin = 0; begin < dim_; begin += kWarp) {
            const int d = begin + lane();
            float sum[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) sum[r] = d < dim_ ? out_[r * dim_ + d] * alpha[r] : 0.0f;
            for (int key = 0; key < count; ++key) {
                const int64_t row = __shfl_sync(kAllLanes, offset, key);
                const float x = d < dim_ ? to_float(v[row + d]) : 0.0f;
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    const float weight = __shfl_sync(kAllLanes, p[r], key);
                    if (seen[r] >> key & 1) sum[r] = fmaf(weight, x, sum[r]);
                }
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (d < dim_) out_[r * dim_ + d] = sum[r];
            }
        }
    }

    // The weight in place of lane r's score; returns what its sums are to be multiplied by.
    __device__ float soften(int r, float& s) {
        const float factor = map_.factor(), top = fmaxf(max_[r], reduce_lanes(s, Highest()));
        const float shift = scaled(finite_top(top), factor);
        const float alpha = exp2_fast(scaled(max_[r], factor) - shift);
        s = exp2_fast(fmaf(s, factor, -shift));
        max_[r] = top;
        sum_[r] = sum_[r] * alpha + s;
        return alpha;
    }

    struct Highest {
        __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
    };

    const TreeAttentionArgs& args_;
    const Item& item_;
    const int dim_, first_, count_;               // the warp's lanes
    const int row_begin_, row_end_;               // of the whole tile
    float *const slice_, *const q_, *const out_;  // [kKeys, kSliceStride]; [kRows, D] of the warp
    const ScoreMap map_;
    int row_[kRows], position_[kRows];  // -1: there is none
    float max_[kRows], sum_[kRows];     // raw where the map is deferred; of this thread's keys
};

template <class T, int kRows>
__global__ void __launch_bounds__(FmaShape::kThreads, 4)
    tree_attention_fma(const __grid_constant__ TreeAttentionLaunch launch) {
    extern __shared__ __align__(16) float floats[];
    if (blockIdx.x >= launch.sizes->tasks * launch.args.num_kv_heads) return;
    const Item item(launch.args, blockIdx.x);
    for (int first = 0; first < item.lanes(); first += FmaShape::kWarps * kRows) {
        FmaTile<T, kRows>(item, first, floats).run();
    }
}

}  // namespace tts::cuda
