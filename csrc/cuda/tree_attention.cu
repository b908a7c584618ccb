// tree_attention: attention of many branches over a tree of KV pages. Each shared token is read once for all
// of them.
//
//   q [T, Hq, D], caches [P, page_size, Hkv, D], plan  ->  out [T, Hq, D], lse [T, Hq]
//
// There are two launches. The first runs the plan's tasks (csrc/host/planner.h), each for each KV head, most
// expensive first. There are as many blocks as the device holds at once, and each takes its share of the
// tasks; only the device knows how many tasks there are. A task may have 128 lanes (rows x query heads of a
// KV head). Blocks of eight warps take all of them at once, so that 64 branches of groups of 4 read a prefix
// only twice. If such blocks do not fit on the device, or there are at most 64 lanes, blocks of four warps
// take 64. If only one task reads a row's keys, it finishes the row. Other tasks store states (sum of
// weighted values, max, sum) in the plan's slots. The second launch merges each row's states in the plan's
// order, with a warp for each row and query head. plan.h defines the order of all sums: it depends neither on
// which block runs when, nor on what else is in the plan.
#include <algorithm>

#include "block_size.cuh"
#include "launch.cuh"
#include "tree_attention.h"
#include "tree_attention_fma.cuh"
#include "tree_attention_mma.cuh"

namespace tts::cuda {
namespace {

// ---- the second launch -----------------------------------------------------------------------------------

constexpr int kMergeWarps = block_size(128) / kWarp;

// Merges a row's states, first to last: chunks from blocks of keys, the row from chunks. each(slot, a, b) is
// called for every merge; for those of the row, slot is -1.
struct RowMerge {
    SoftmaxState row, chunk;

    template <class F>
    __device__ void run(const TreeAttentionArgs& args, int begin, int end, int head, F each) {
        for (int i = begin; i <= end; ++i) {
            const int entry = i < end ? args.merge_slots[i] : 0;
            if (i == end || !continues(entry)) {
                const Merge merged(row, chunk);
                each(-1, merged);
                row = merged.state, chunk = {};
            }
            if (i == end) return;
            const float2 x = *slot_state(args, slot_of(entry), head);
            const Merge merged(chunk, {x.x, x.y});
            each(slot_of(entry), merged);
            chunk = merged.state;
        }
    }
};

template <class T>
__global__ void __launch_bounds__(kMergeWarps* kWarp)
    merge_partials(const __grid_constant__ TreeAttentionArgs args) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kMergeWarps + warp();
    if (index >= args.num_rows * args.num_q_heads) return;
    const int row = static_cast<int>(index / args.num_q_heads),
              head = static_cast<int>(index % args.num_q_heads);
    if (!is_merged(args, row) && args.positions[row] >= 0) return;  // its task has written the result
    const int begin = args.merge_indptr[row], end = args.merge_indptr[row + 1];
    const int64_t out_index = int64_t{args.rows[row]} * args.num_q_heads + head;
    T* out = static_cast<T*>(args.out) + out_index * args.head_dim;
    constexpr int kEach = 4;
    for (int first = 0; first < args.head_dim; first += kEach * kWarp) {
        float of_row[kEach] = {}, of_chunk[kEach] = {};
        RowMerge merge;
        merge.run(args, begin, end, head, [&](int slot, const Merge& merged) {
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                const int d = first + i * kWarp + lane();
                if (slot < 0) {
                    of_row[i] = merged(of_row[i], of_chunk[i]), of_chunk[i] = 0.0f;
                } else {
                    const float x = d < args.head_dim ? slot_row(args, slot, head)[d] : 0.0f;
                    of_chunk[i] = merged(of_chunk[i], x);
                }
            }
        });
        const Result result(args, head, merge.row);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int d = first + i * kWarp + lane();
            if (d < args.head_dim) out[d] = from_float<T>(result(of_row[i]));
        }
        if (first == 0 && lane() == 0) args.lse[out_index] = result.lse;
    }
}

// ---- launches --------------------------------------------------------------------------------------------

constexpr int64_t kMostDim = 256, kMostDimWide = 128;  // on tensor cores; in blocks of eight warps
constexpr bool kHasWide = block_size(256) == 256;

bool has_matrix_form(const TreeAttentionArgs& args) {
    return args.dtype != DType::f32 && args.head_dim % 8 == 0 && args.head_dim <= kMostDim;
}

bool has_codes(const TreeAttentionArgs& args) { return args.format != KvFormat::plain; }

// Whether a cache can be read 16 bytes at a time, and its scales and zeros 4 bytes at a time.
bool in_units(const PagedCache& cache, const KvScales& beside, int64_t element_bytes) {
    return aligned(cache.data,
                   element_bytes * (cache.page_stride | cache.token_stride | cache.head_stride)) &&
           aligned<4>(beside.scale) && aligned<4>(beside.zero);
}

template <class T, int kDim, int kWarps, bool kCodes>
void launch_mma(TreeAttentionLaunch call, int64_t blocks, cudaStream_t stream) {
    using Shape = MmaShape<kDim, kWarps, kCodes>;
    const TreeAttentionArgs& args = call.args;
    const int64_t element_bytes = kCodes ? 1 : 2;
    call.aligned = aligned(args.q, 2 * (args.q_row_stride | args.q_head_stride)) &&
                   in_units(args.k, args.k_scales, element_bytes) &&
                   in_units(args.v, args.v_scales, element_bytes);
    launch(tree_attention_mma<T, kDim, kWarps, kCodes>, blocks, Shape::kThreads, Shape::kShared, stream,
           call);
}

template <class T, int kDim, int kWarps>
void launch_mma(const TreeAttentionLaunch& call, int64_t blocks, cudaStream_t stream) {
    has_codes(call.args) ? launch_mma<T, kDim, kWarps, true>(call, blocks, stream)
                         : launch_mma<T, kDim, kWarps, false>(call, blocks, stream);
}

template <class T, int kDim>
void launch_mma(const TreeAttentionLaunch& call, const TreeAttentionGrid& grid, cudaStream_t stream) {
    if constexpr (kDim <= kMostDimWide) {
        if (grid.lanes > kHalfLanes) return launch_mma<T, kDim, 8>(call, grid.blocks, stream);
    }
    launch_mma<T, kDim, 4>(call, grid.blocks, stream);
}

// The number of lanes for each warp.
int fma_lanes(int64_t head_dim) {
    constexpr int kMany = 4;  // if they fit into 48 KB
    return FmaShape::shared(kMany, head_dim) <= 48 << 10 ? kMany : 1;
}

template <class T>
void launch_fma(const TreeAttentionLaunch& call, int64_t blocks, cudaStream_t stream) {
    const int lanes = fma_lanes(call.args.head_dim);
    const auto shared = static_cast<int>(FmaShape::shared(lanes, call.args.head_dim));
    const auto run = [&]<bool kCodes>() {
        launch(lanes > 1 ? tree_attention_fma<T, 4, kCodes> : tree_attention_fma<T, 1, kCodes>, blocks,
               FmaShape::kThreads, shared, stream, call);
    };
    has_codes(call.args) ? run.template operator()<true>() : run.template operator()<false>();
}

template <class T>
void launch_tasks(const TreeAttentionLaunch& call, const TreeAttentionGrid& grid, cudaStream_t stream) {
    const int64_t dim = call.args.head_dim;
    if constexpr (sizeof(T) == 2) {
        if (!has_matrix_form(call.args)) return launch_fma<T>(call, grid.blocks, stream);
        if (dim <= 64) return launch_mma<T, 64>(call, grid, stream);
        if (dim <= 96) return launch_mma<T, 96>(call, grid, stream);
        if (dim <= 128) return launch_mma<T, 128>(call, grid, stream);
        return launch_mma<T, 256>(call, grid, stream);
    }
    launch_fma<T>(call, grid.blocks, stream);
}

// Whether blocks of eight warps are faster: they read a task's keys once, while blocks of four read them
// twice.
bool runs_wide(const TreeAttentionArgs& args) {
    return kHasWide && has_matrix_form(args) && args.head_dim <= kMostDimWide &&
           task_parts(args, kHalfLanes) > 1 &&
           device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >=
               MmaShape<kMostDimWide, 8, true>::kShared;
}

}  // namespace

TreeAttentionGrid tree_attention_grid(const TreeAttentionArgs& args, int64_t max_tasks) {
    const bool wide = runs_wide(args);
    const bool few_registers = args.dtype == DType::f32 && !has_codes(args);
    const int64_t blocks_an_sm = wide ? 1 : few_registers ? 3 : 2;
    const int64_t lanes = wide ? kTaskLanes : kHalfLanes,
                  items = max_tasks * args.num_kv_heads * task_parts(args, lanes);
    return {std::min(items, device_attribute(cudaDevAttrMultiProcessorCount) * blocks_an_sm), lanes};
}

void tree_attention(const TreeAttentionArgs& args, const PlanSizes* sizes, float* own,
                    const TreeAttentionGrid& grid, cudaStream_t stream) {
    dispatch(args.dtype, [&]<class T>(T*) {
        launch_tasks<T>({args, sizes, own, false}, grid, stream);
        launch(merge_partials<T>, divide_up(args.num_rows * args.num_q_heads, kMergeWarps),
               kMergeWarps * kWarp, 0, stream, args);
    });
}

}  // namespace tts::cuda
