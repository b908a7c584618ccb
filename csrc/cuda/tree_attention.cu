// tree_attention: attention of many branches over a tree of KV pages, each shared token read once for all of
// them.
//
//   q [T, Hq, D], caches [P, page_size, Hkv, D], plan  ->  out [T, Hq, D], lse [T, Hq]
//
// Two launches. The first has a block for each task of the plan (csrc/host/planner.h) and KV head, as many as
// the plan's tables have room for, since how many are in use is known to the device only: those beyond it
// leave at once. A row that one task alone reads is finished there; the others leave a partial state (sum of
// weighted values, max, sum) in the task's slots. The second merges each row's states in the plan's order, a
// warp for each row and query head. Nothing depends on which block runs when.
#include "launch.cuh"
#include "tree_attention.h"
#include "tree_attention_fma.cuh"
#include "tree_attention_mma.cuh"

namespace tts::cuda {
namespace {

// ---- the second launch -----------------------------------------------------------------------------------

constexpr int kMergeWarps = 4;

__device__ SoftmaxState partial_state(const TreeAttentionArgs& args, int64_t slot, int head) {
    const float2 x = reinterpret_cast<const float2*>(args.partial_states)[slot * args.num_q_heads + head];
    return {x.x, x.y};
}

// The states of slots [begin, end) of merge_slots, first to last.
__device__ SoftmaxState merge_states(const TreeAttentionArgs& args, int begin, int end, int head) {
    SoftmaxState merged;
    for (int i = begin; i < end; ++i) {
        merged.max = fmaxf(merged.max, partial_state(args, args.merge_slots[i], head).max);
    }
    for (int i = begin; i < end; ++i) {
        const SoftmaxState part = partial_state(args, args.merge_slots[i], head);
        merged.sum += weight(part.max, merged.max) * part.sum;
    }
    return merged;
}

template <class T>
__global__ void __launch_bounds__(kMergeWarps* kWarp)
    merge_partials(const __grid_constant__ TreeAttentionArgs args) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kMergeWarps + warp();
    if (index >= args.num_rows * args.num_q_heads) return;
    const int64_t row = index / args.num_q_heads;
    const int head = static_cast<int>(index % args.num_q_heads);
    const int begin = args.merge_indptr[row], end = args.merge_indptr[row + 1];
    if (end - begin == 1) return;  // finished by its task
    const SoftmaxState state = merge_states(args, begin, end, head);
    write_result<T>(args, args.rows[row], head, state, [&](int d) {
        float sum = 0.0f;
        for (int i = begin; i < end; ++i) {
            const int64_t slot = args.merge_slots[i];
            const SoftmaxState part = partial_state(args, slot, head);
            if (part.empty()) continue;
            const float x = args.partial_rows[(slot * args.num_q_heads + head) * args.padded_dim + d];
            sum = fmaf(weight(part.max, state.max), x, sum);
        }
        return sum;
    });
}

// ---- launches --------------------------------------------------------------------------------------------

bool in_units_of_16(const PagedCache& cache) {
    return aligned(cache.data, 2 * (cache.page_stride | cache.token_stride | cache.head_stride));
}

template <class T, int kDim>
void launch_mma(TreeAttentionLaunch call, int64_t blocks, cudaStream_t stream) {
    using Shape = MmaShape<kDim>;
    const TreeAttentionArgs& args = call.args;
    call.aligned = aligned(args.q, 2 * (args.q_row_stride | args.q_head_stride)) && in_units_of_16(args.k) &&
                   in_units_of_16(args.v);
    launch(tree_attention_mma<T, kDim>, blocks, Shape::kThreads, Shape::kShared, stream, call);
}

template <class T>
void launch_fma(const TreeAttentionLaunch& call, int64_t blocks, cudaStream_t stream) {
    constexpr int kMany = 4;  // lanes a warp where they fit into 48 KB
    const bool fits = FmaShape::shared(kMany, call.args.head_dim) <= 48 << 10;
    const auto shared = static_cast<int>(FmaShape::shared(fits ? kMany : 1, call.args.head_dim));
    launch(fits ? tree_attention_fma<T, kMany> : tree_attention_fma<T, 1>, blocks, FmaShape::kThreads, shared,
           stream, call);
}

template <class T>
void launch_tasks(const TreeAttentionLaunch& call, int64_t blocks, cudaStream_t stream) {
    const int64_t dim = call.args.head_dim;
    if constexpr (sizeof(T) == 2) {
        if (dim % 8 == 0 && dim <= 64) return launch_mma<T, 64>(call, blocks, stream);
        if (dim % 8 == 0 && dim <= 96) return launch_mma<T, 96>(call, blocks, stream);
        if (dim % 8 == 0 && dim <= 128) return launch_mma<T, 128>(call, blocks, stream);
        if (dim % 8 == 0 && dim <= 256) return launch_mma<T, 256>(call, blocks, stream);
    }
    launch_fma<T>(call, blocks, stream);
}

}  // namespace

void tree_attention(const TreeAttentionArgs& args, const PlanSizes* sizes, int64_t max_tasks,
                    cudaStream_t stream) {
    dispatch(args.dtype, [&]<class T>(T*) {
        launch_tasks<T>({args, sizes, false}, max_tasks * args.num_kv_heads, stream);
        launch(merge_partials<T>, divide_up(args.num_rows * args.num_q_heads, kMergeWarps),
               kMergeWarps * kWarp, 0, stream, args);
    });
}

}  // namespace tts::cuda
