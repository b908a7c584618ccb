// torch.ops.tts_kernels.tree_attention on a GPU
//
// Only the device knows the sizes in the plan's tables, so the grid and the workspace are made for the
// largest sizes that fit in the tables.
#include "../../cuda/tree_attention.h"

#include <algorithm>

#include "../attention.h"
#include "common.h"

namespace tts::ops {
namespace {

const int32_t* int32s(const Tensor& t, int64_t dim, int64_t size, const char* what) {
    require(is_here(t) && t.is_contiguous() && t.scalar_type() == ScalarType::Int && t.dim() == dim, what);
    require(size < 0 || t.size(dim - 1) == size, what);
    return static_cast<const int32_t*>(t.const_data_ptr());
}

void check_tensors(const Tensor& q, const LayerCaches& caches, int64_t page_size, int64_t num_kv_heads) {
    require(q.dim() == 3 && q.size(2) >= 1 && q.size(2) <= cuda::kMaxHeadDim, "q");
    require(page_size >= 1 && caches.k.size(1) == page_size && caches.k.size(2) == num_kv_heads &&
                caches.head_dim == q.size(2),
            "caches");
    require(num_kv_heads >= 1 && q.size(1) % num_kv_heads == 0, "q");
}

std::tuple<Tensor, Tensor> tree_attention(
    const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache, const Tensor& rows,
    const Tensor& positions, const Tensor& pages, const Tensor& segments, const Tensor& tasks,
    const Tensor& merge_indptr, const Tensor& merge_slots, const Tensor& sizes, int64_t page_size,
    int64_t num_kv_heads, int64_t max_slots, double scale, double softcap, int64_t window,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, const std::optional<Tensor>& k_zero,
    const std::optional<Tensor>& v_zero) {
    const OnDevice device(q_in);
    const Tensor q = q_in.dim() == 3 && rows_contiguous(q_in) ? q_in : dense(q_in);
    const LayerCaches caches(k_cache, v_cache, q.scalar_type(), {k_scale, v_scale, k_zero, v_zero});
    check_tensors(q, caches, page_size, num_kv_heads);
    require(std::isfinite(scale) && std::isfinite(softcap) && softcap >= 0.0, "scale, softcap");
    require(max_slots >= 0, "max_slots");
    const int64_t num_rows = q.size(0), num_q_heads = q.size(1), head_dim = q.size(2);
    Tensor out = empty(q, {num_rows, num_q_heads, head_dim}, q.scalar_type());
    Tensor lse = empty(q, {num_rows, num_q_heads}, ScalarType::Float);
    require(!sinks || (is_here(*sinks) && sinks->dim() == 1 && sinks->size(0) == num_q_heads), "sinks");
    TreeAttentionArgs args{
        .dtype = dtype(q),
        .q = q.const_data_ptr(),
        .q_row_stride = q.stride(0),
        .q_head_stride = q.stride(1),
        .k = paged(k_cache),
        .v = paged(v_cache),
        .page_size = page_size,
        .num_rows = num_rows,
        .num_q_heads = num_q_heads,
        .num_kv_heads = num_kv_heads,
        .head_dim = head_dim,
        .rows = int32s(rows, 1, num_rows, "rows"),
        .positions = int32s(positions, 1, num_rows, "positions"),
        .pages = int32s(pages, 1, -1, "pages"),
        .segments = reinterpret_cast<const Segment*>(int32s(segments, 2, kSegmentInts, "segments")),
        .tasks = reinterpret_cast<const Task*>(int32s(tasks, 2, kTaskInts, "tasks")),
        .merge_indptr = int32s(merge_indptr, 1, num_rows + 1, "merge_indptr"),
        .merge_slots = int32s(merge_slots, 1, -1, "merge_slots"),
        .scale = static_cast<float>(scale),
        .softcap = static_cast<float>(softcap),
        .window = std::clamp<int64_t>(window, 0, INT32_MAX),
        .sinks = sinks ? float32(*sinks) : nullptr,
        .out = out.mutable_data_ptr(),
        .lse = data<float>(lse),
        .partial_rows = nullptr,
        .partial_states = nullptr,
        .padded_dim = head_dim,
        .format = caches.format,
        .k_scales = caches.k_scales,
        .v_scales = caches.v_scales,
    };
    const auto* used = reinterpret_cast<const PlanSizes*>(int32s(sizes, 1, kPlanSizes, "sizes"));
    if (num_rows * num_q_heads == 0) return {out, lse};
    const int64_t partials = max_slots * num_q_heads;
    const cuda::TreeAttentionGrid grid = cuda::tree_attention_grid(args, tasks.size(0));
    Tensor workspace =
        empty(q, {partials * (head_dim + 2) + grid.blocks * grid.lanes * head_dim}, ScalarType::Float);
    args.partial_states = data<float>(workspace);
    args.partial_rows = args.partial_states + 2 * partials;
    cuda::tree_attention(args, used, args.partial_rows + partials * head_dim, grid, device.stream());
    return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) {
    m.impl("tree_attention", TTS_BOX(&tree_attention));
}

}  // namespace tts::ops
