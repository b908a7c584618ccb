// What both ways of running a task share: its rows, the keys that they see, where a result goes.
#pragma once

#include "softmax_state.cuh"
#include "tree_attention.h"
#include "vector.cuh"

namespace tts::cuda {

struct TreeAttentionLaunch {
    TreeAttentionArgs args;
    const PlanSizes* sizes;
    bool aligned;  // queries and keys can be read 16 bytes at a time
};

// A task for one KV head. A *lane* is one query head of one row:
// lane = (row - hull begin) * group + head within the group.
struct Item {
    const TreeAttentionArgs& args;
    Task task;
    int kv_head, group;

    __device__ Item(const TreeAttentionArgs& args, unsigned index)
        : args(args),
          task(args.tasks[index / static_cast<unsigned>(args.num_kv_heads)]),
          kv_head(static_cast<int>(index % static_cast<unsigned>(args.num_kv_heads))),
          group(static_cast<int>(args.num_q_heads) / static_cast<int>(args.num_kv_heads)) {}

    __device__ int lanes() const { return (task.row_end - task.row_begin) * group; }
    __device__ int row(int lane) const { return task.row_begin + lane / group; }
    __device__ int head(int lane) const { return kv_head * group + lane % group; }

    template <class T>
    __device__ const T* query(int lane) const {
        return static_cast<const T*>(args.q) + args.rows[row(lane)] * args.q_row_stride +
               head(lane) * args.q_head_stride;
    }

    // Offset of this head's row of a token, counted from the start of a segment.
    __device__ int64_t offset(const PagedCache& cache, const Segment& segment, int token) const {
        const int page_size = static_cast<int>(args.page_size), page = token / page_size;
        return args.pages[segment.page_begin + page] * cache.page_stride +
               (token - page * page_size) * cache.token_stride + kv_head * cache.head_stride;
    }
};

struct Range {
    int begin, end;
};

// The keys of a segment that a row sees, counted from its start; {0, 0} if none.
__device__ inline Range visible(const TreeAttentionArgs& args, const Segment& segment, int row,
                                int position) {
    const int last = position + 1 - segment.start;
    if (row < segment.row_begin || row >= segment.row_end || last <= 0) return {0, 0};
    const int begin = args.window > 0 ? max(last - static_cast<int>(args.window), 0) : 0;
    const int end = min(last, segment.length);
    return begin < end ? Range{begin, end} : Range{0, 0};
}

// What rows [row_begin, row_end) see of a segment: some of them [begin, end), every one of them
// [all_begin, all_end). The same in every lane of every warp.
struct View {
    int begin = INT32_MAX, end = 0, all_begin = 0, all_end = INT32_MAX;

    __device__ View(const TreeAttentionArgs& args, const Segment& segment, int row_begin, int row_end) {
        for (int row = row_begin + lane(); row < row_end; row += kWarp) {
            const Range seen = visible(args, segment, row, args.positions[row]);
            if (seen.begin < seen.end) begin = min(begin, seen.begin), end = max(end, seen.end);
            all_begin = max(all_begin, seen.begin), all_end = min(all_end, seen.end);
        }
        begin = __reduce_min_sync(kAllLanes, begin), end = __reduce_max_sync(kAllLanes, end);
        all_begin = __reduce_max_sync(kAllLanes, all_begin), all_end = __reduce_min_sync(kAllLanes, all_end);
    }
};

// Scores are compared and exponentiated in units of log2. Without a softcap and with a positive scale the raw
// scores are compared as they are, and the factor is applied within the exponent.
struct ScoreMap {
    float scale, softcap, inner;  // inner: what raw scores are multiplied by within the tanh

    __device__ explicit ScoreMap(const TreeAttentionArgs& args)
        : scale(args.scale), softcap(args.softcap), inner(args.scale * reciprocal(args.softcap)) {}

    __device__ bool deferred() const { return softcap == 0.0f && scale > 0.0f; }
    __device__ float factor() const { return deferred() ? scale * kLog2E : 1.0f; }
    __device__ float operator()(float raw) const {
        return softcap == 0.0f ? raw * (scale * kLog2E) : tanhf(raw * inner) * (softcap * kLog2E);
    }
};

// A max in units of log2. Rounded, as the weights subtract it: fused with the difference of two of them, the
// old one would be another number than the one that was subtracted, and large scores would lose their
// weights.
__device__ inline float scaled(float top, float factor) { return __fmul_rn(top, factor); }

// ---- results, written by a warp --------------------------------------------------------------------------

// out = row / sum; the empty state gives 0. value(d) is element d of the row.
template <class T, class F>
__device__ void write_result(const TreeAttentionArgs& args, int64_t packed_row, int head, SoftmaxState state,
                             F value) {
    const int64_t index = packed_row * args.num_q_heads + head;
    T* out = static_cast<T*>(args.out) + index * args.head_dim;
    const float factor = state.empty() ? 0.0f : reciprocal(state.sum);
    const int dim = static_cast<int>(args.head_dim);
    for (int d = lane(); d < dim; d += kWarp) out[d] = from_float<T>(value(d) * factor);
    if (lane() == 0) args.lse[index] = state.lse();
}

// The state of one lane of an item to where the plan wants it: straight to out if its task alone reads the
// row, else to its slot.
template <class T, class F>
__device__ void write_lane(const Item& item, int lane_of_item, SoftmaxState state, F value) {
    const TreeAttentionArgs& args = item.args;
    const int row = item.row(lane_of_item), head = item.head(lane_of_item);
    const int64_t slot = item.task.slot + (row - item.task.row_begin);
    const int begin = args.merge_indptr[row], slots = args.merge_indptr[row + 1] - begin;
    if (slots == 1 && args.merge_slots[begin] == slot) {
        write_result<T>(args, args.rows[row], head, state, value);
    } else if (slots > 1) {
        const int64_t index = slot * args.num_q_heads + head;
        float* to = args.partial_rows + index * args.padded_dim;
        for (int d = lane(); d < args.head_dim; d += kWarp) to[d] = value(d);
        if (lane() < 2) args.partial_states[2 * index + lane()] = lane() == 0 ? state.max : state.sum;
    }
}

}  // namespace tts::cuda
