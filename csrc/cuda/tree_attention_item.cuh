// The common part of both ways to run a task: its rows, the keys that they see, and the place of a result.
#pragma once

#include "softmax_state.cuh"
#include "tree_attention.h"
#include "vector.cuh"

namespace tts::cuda {

struct TreeAttentionLaunch {
    TreeAttentionArgs args;
    const PlanSizes* sizes;  // used numbers of the plan
    float* own;              // [blocks, lanes, D]: each tile's own states, between two chunks of keys
    bool aligned;            // queries and keys can be read 16 bytes at a time, scales and zeros 4
};

// A page of the caches, and a token's slot in it.
struct Place {
    int page, slot;
};

// A task for one KV head. A *lane* is one query head of one row:
// lane = (row - hull begin) * group + head within the group.
struct Item {
    const TreeAttentionArgs& args;
    Task task;
    int kv_head, group;

    __device__ Item(const TreeAttentionArgs& args, unsigned task, unsigned kv_head)
        : args(args),
          task(args.tasks[task]),
          kv_head(static_cast<int>(kv_head)),
          group(static_cast<int>(args.num_q_heads) / static_cast<int>(args.num_kv_heads)) {}

    __device__ int lanes() const { return (task.row_end - task.row_begin) * group; }
    __device__ int row(int lane) const { return task.row_begin + lane / group; }
    __device__ int head(int lane) const { return kv_head * group + lane % group; }

    template <class T>
    __device__ const T* query(int lane) const {
        return static_cast<const T*>(args.q) + args.rows[row(lane)] * args.q_row_stride +
               head(lane) * args.q_head_stride;
    }

    // The place of a segment's token at a position.
    __device__ Place place(const Segment& segment, int position) const {
        const int page_size = static_cast<int>(args.page_size), page = position / page_size;
        return {args.pages[segment.page_begin + page - segment.start / page_size],
                position - page * page_size};
    }

    // The offset of this head's row of a token.
    __device__ int64_t offset(const PagedCache& cache, Place token) const {
        return token.page * cache.page_stride + token.slot * cache.token_stride + kv_head * cache.head_stride;
    }

    // The index of the scales and zeros of a token's head.
    __device__ int64_t number(Place token) const {
        return (token.page * args.page_size + token.slot) * args.num_kv_heads + kv_head;
    }
};

// Calls f(item, begin, end) for all lanes of this block's items, kLanes at a time. The later lanes of a task
// are separate items, after all others.
template <int kLanes, class F>
__device__ void each_item(const TreeAttentionLaunch& launch, F f) {
    const auto heads = static_cast<unsigned>(launch.args.num_kv_heads);
    const unsigned items = launch.sizes->tasks * heads;
    const int parts = static_cast<int>(task_parts(launch.args, kLanes));
    for (unsigned index = blockIdx.x; index < items * parts; index += gridDim.x) {
        const Item item(launch.args, index % items / heads, index % heads);
        const int lanes = item.lanes(), part = static_cast<int>(index / items);
        for (int begin = part * kLanes; begin < lanes; begin += parts * kLanes) {
            f(item, begin, min(begin + kLanes, lanes));
        }
    }
}

// Positions.
struct Range {
    int begin, end;
};

// The keys of a segment that a row sees; {0, 0} if there are none.
__device__ inline Range visible(const TreeAttentionArgs& args, const Segment& segment, int row,
                                int position) {
    if (row < segment.row_begin || row >= segment.row_end) return {0, 0};
    const int oldest = args.window > 0 ? max(position + 1 - static_cast<int>(args.window), 0) : 0;
    const int begin = max(segment.start, oldest), end = min(segment.start + segment.length, position + 1);
    return begin < end ? Range{begin, end} : Range{0, 0};
}

// The keys of a segment that rows [row_begin, row_end) see: at least one row sees [begin, end), where begin
// is a multiple of kKeyBlock; all rows see [all_begin, all_end). The values are the same in all lanes of all
// warps.
struct SeenRange {
    int begin = INT32_MAX, end = 0, all_begin = 0, all_end = INT32_MAX;

    __device__ SeenRange(const TreeAttentionArgs& args, const Segment& segment, int row_begin, int row_end) {
        for (int row = row_begin + lane(); row < row_end; row += kWarp) {
            const Range seen = visible(args, segment, row, args.positions[row]);
            if (seen.begin < seen.end) begin = min(begin, seen.begin), end = max(end, seen.end);
            all_begin = max(all_begin, seen.begin), all_end = min(all_end, seen.end);
        }
        begin = __reduce_min_sync(kAllLanes, begin), end = __reduce_max_sync(kAllLanes, end);
        all_begin = __reduce_max_sync(kAllLanes, all_begin), all_end = __reduce_min_sync(kAllLanes, all_end);
        begin = max(begin / kKeyBlock * kKeyBlock, segment.start);
    }
};

// Scores are compared and exponentiated in units of log2. Without a softcap and with a positive scale, raw
// scores are compared, and the factor is applied within the exponent.
struct ScoreMap {
    float scale, softcap, inner;  // inner: factor of raw scores within the tanh

    __device__ explicit ScoreMap(const TreeAttentionArgs& args)
        : scale(args.scale), softcap(args.softcap), inner(args.scale * reciprocal(args.softcap)) {}

    __device__ bool deferred() const { return softcap == 0.0f && scale > 0.0f; }
    __device__ float factor() const { return deferred() ? scale * kLog2E : 1.0f; }
    __device__ float operator()(float raw) const {
        return softcap == 0.0f ? raw * (scale * kLog2E) : tanhf(raw * inner) * (softcap * kLog2E);
    }
};

// A max in units of log2, rounded before it is subtracted. Otherwise, in the difference of two maxima, a
// fused operation would use the unrounded old max, not the number that was subtracted from the scores. For
// large scores, weights would be wrong.
__device__ inline float scaled(float top, float factor) { return __fmul_rn(top, factor); }

// ---- results ----------------------------------------------------------------------------------------------

// Whether a row's states are merged by the second launch.
__device__ inline bool is_merged(const TreeAttentionArgs& args, int row) {
    return args.merge_indptr[row] < args.merge_indptr[row + 1];
}

__device__ inline float* slot_row(const TreeAttentionArgs& args, int64_t slot, int head) {
    return args.partial_rows + (slot * args.num_q_heads + head) * args.padded_dim;
}

__device__ inline float2* slot_state(const TreeAttentionArgs& args, int64_t slot, int head) {
    return reinterpret_cast<float2*>(args.partial_states) + slot * args.num_q_heads + head;
}

// How a row's state becomes its result: the log-sum-exp, and the factor of its sums of weighted values x. A
// zero becomes +0, by arithmetic that cannot be fused. The sign of a zero in x comes only from signs of
// zeros, which may be those of hidden keys: their values are multiplied by weights of 0.
struct Result {
    float lse, factor;

    __device__ Result(const TreeAttentionArgs& args, int head, SoftmaxState state) {
        const bool empty = state.empty();
        float kept = 1.0f;
        if (args.sinks) {  // a weight without a value
            const Merge with_sink(state, {__fmul_rn(args.sinks[head], kLog2E), 1.0f});
            kept = with_sink.a, state = with_sink.state;
        }
        lse = state.lse();
        factor = empty ? 0.0f : kept * reciprocal(state.sum);
    }

    __device__ float operator()(float x) const { return __fadd_rn(__fmul_rn(x, factor), 0.0f); }
};

// The target for the state of a lane's chunk when the next chunk begins or the task ends. kOwn: it is merged
// into the task's own state; otherwise a slot.
enum Target : int { kNone = -2, kOwn = -1 };

}  // namespace tts::cuda
