// torch.ops.tts_kernels.tree_attention
#include <algorithm>

#include "attention.h"
#include "decoder.h"

namespace tts::ops {
namespace {

constexpr int64_t kAlign = 16;      // floats: a cache line
constexpr int64_t kMergeRows = 16;  // rows that a thread merges at a time

// ---- the plan, checked ------------------------------------------------------------------------------------

const int32_t* int32s(const Tensor& t, int64_t dim, const char* what) {
    require(t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::Int && t.dim() == dim, what);
    return static_cast<const int32_t*>(t.const_data_ptr());
}

bool in_range(const int32_t* values, int64_t count, int64_t low, int64_t high) {
    bool good = true;
    for (int64_t i = 0; i < count; ++i) good &= values[i] >= low && values[i] < high;
    return good;
}

struct PlanTensors {
    const Tensor &rows, &positions, &pages, &segments, &tasks, &merge_indptr, &merge_slots, &sizes;
    int64_t page_size, max_slots;
    int64_t num_rows = 0, num_segments = 0, num_tasks = 0, num_slots = 0, num_pages = 0, max_hull = 0;

    // Fills the plan's part of `args`. After it, every index that a kernel will use is in range.
    void check(TreeAttentionArgs& args, int64_t cache_pages) {
        num_rows = rows.numel();
        args.rows = int32s(rows, 1, "rows");
        args.positions = int32s(positions, 1, "positions");
        args.pages = int32s(pages, 1, "pages");
        args.segments = reinterpret_cast<const Segment*>(int32s(segments, 2, "segments"));
        args.tasks = reinterpret_cast<const Task*>(int32s(tasks, 2, "tasks"));
        args.merge_indptr = int32s(merge_indptr, 1, "merge_indptr");
        args.merge_slots = int32s(merge_slots, 1, "merge_slots");
        require(positions.numel() == num_rows && merge_indptr.numel() == num_rows + 1,
                "positions, merge_indptr");
        require(segments.size(1) == kSegmentInts && tasks.size(1) == kTaskInts, "segments, tasks");
        check_sizes();
        require(in_range(args.pages, num_pages, 0, cache_pages), "pages");
        check_rows(args.rows);
        for (int64_t i = 0; i < num_segments; ++i) check_segment(args.segments[i]);
        check_merge(args.merge_indptr, args.merge_slots);
        for (int64_t i = 0; i < num_tasks; ++i) check_task(args.tasks[i], args.segments, args.merge_indptr);
    }

  private:
    void check_sizes() {
        const int32_t* used = int32s(sizes, 1, "sizes");
        require(sizes.numel() == kPlanSizes && page_size >= 1 && in_range(used, kPlanSizes, 0, INT32_MAX),
                "sizes");
        const auto& plan = *reinterpret_cast<const PlanSizes*>(used);
        num_segments = plan.segments, num_tasks = plan.tasks, num_slots = plan.slots, num_pages = plan.pages;
        require(num_segments <= segments.size(0) && num_tasks <= tasks.size(0) && num_slots <= max_slots &&
                    num_pages <= pages.numel(),
                "sizes");
    }

    // A permutation: each row of out is written once.
    void check_rows(const int32_t* row) const {
        require(in_range(row, num_rows, 0, num_rows), "rows");
        std::vector<uint8_t> seen(static_cast<size_t>(num_rows), 0);
        for (int64_t i = 0; i < num_rows; ++i) seen[static_cast<size_t>(row[i])] = 1;
        require(std::count(seen.begin(), seen.end(), 1) == num_rows, "rows");
    }

    bool is_slot(int64_t slot, int64_t rows) const { return slot >= 0 && slot + rows <= num_slots; }

    void check_segment(const Segment& s) const {
        require(s.page_begin >= 0 && s.start >= 0 && s.length > 0, "segments");
        require(s.page_begin + divide_up(s.start % page_size + s.length, page_size) <= num_pages, "segments");
        require(0 <= s.row_begin && s.row_begin < s.row_end && s.row_end <= num_rows, "segments");
        require(s.slot == -1 || is_slot(s.slot, s.row_end - s.row_begin), "segments");
    }

    // `indptr` as merge_indptr, checked.
    void check_task(const Task& t, const Segment* segment, const int32_t* indptr) {
        require(0 <= t.seg_begin && t.seg_begin <= t.seg_end && t.seg_end <= num_segments, "tasks");
        require(0 <= t.row_begin && t.row_begin <= t.row_end && t.row_end <= num_rows, "tasks");
        const int64_t hull = t.row_end - t.row_begin;
        const bool has_slot = is_slot(t.slot, hull);
        for (int64_t i = t.seg_begin; i < t.seg_end; ++i) {
            const Segment& s = segment[i];
            require(s.row_begin >= t.row_begin && s.row_end <= t.row_end, "tasks");
            require(s.slot >= 0 || has_slot || indptr[s.row_begin] == indptr[s.row_end], "tasks");
        }
        max_hull = std::max(max_hull, hull);
    }

    void check_merge(const int32_t* indptr, const int32_t* entries) const {
        bool good = indptr[0] == 0 && indptr[num_rows] <= merge_slots.numel();
        for (int64_t i = 0; i < num_rows; ++i) good &= indptr[i] <= indptr[i + 1];
        require(good, "merge_indptr");
        require(in_range(entries, indptr[num_rows], 0, 2 * num_slots), "merge_slots");
    }
};

// ---- the tensors ------------------------------------------------------------------------------------------

void check_tensors(const Tensor& q, const LayerCaches& caches, const PlanTensors& plan,
                   int64_t num_kv_heads) {
    require(q.dim() == 3 && q.size(2) >= 1 && rows_contiguous(q), "q");
    require(caches.k.size(1) == plan.page_size && caches.k.size(2) == num_kv_heads &&
                caches.head_dim == q.size(2),
            "caches");
    require(q.size(0) == plan.rows.numel() && num_kv_heads >= 1 && q.size(1) % num_kv_heads == 0, "q");
}

const float* sink_logits(const std::optional<Tensor>& sinks, int64_t num_q_heads) {
    if (!sinks) return nullptr;
    require(sinks->dim() == 1 && sinks->numel() == num_q_heads, "sinks");
    return float32(*sinks);
}

// If all segments of a task are narrow, reading keys limits its speed. It then reads whole tokens, with all
// heads together.
bool narrow(const TreeAttentionArgs& args, const Task& task) {
    const int64_t group = args.num_q_heads / args.num_kv_heads;
    for (int64_t i = task.seg_begin; i < task.seg_end; ++i) {
        if ((args.segments[i].row_end - args.segments[i].row_begin) * group > kNarrow) return false;
    }
    return true;
}

// A narrow task is one item for all heads, or for some of them if there are few tasks for the threads.
std::vector<WorkItem> work_items(const TreeAttentionArgs& args, int64_t num_tasks) {
    const int64_t heads = args.num_kv_heads, wanted = 2 * threads_for(num_tasks * heads, num_tasks * heads);
    const int64_t together = divide_up(heads, std::min(heads, divide_up(wanted, num_tasks)));
    std::vector<WorkItem> items;
    for (int64_t task = 0; task < num_tasks; ++task) {
        const int64_t step = narrow(args, args.tasks[task]) ? together : 1;
        for (int64_t head = 0; head < heads; head += step) {
            items.push_back({static_cast<int32_t>(task), static_cast<int32_t>(head),
                             static_cast<int32_t>(std::min(head + step, heads))});
        }
    }
    return items;
}

// The size of the scratch that is enough for every item.
int64_t scratch_size(const TreeAttentionArgs& args, const std::vector<WorkItem>& items, int64_t max_hull) {
    const int64_t group = args.num_q_heads / args.num_kv_heads;
    int64_t states = 0;
    for (const WorkItem& item : items) {
        const Task& task = args.tasks[item.task];
        const Segment* segment = args.segments;
        const bool own = std::any_of(segment + task.seg_begin, segment + task.seg_end,
                                     [](const Segment& s) { return s.slot < 0; });
        const int64_t lanes = (task.row_end - task.row_begin) * group;
        if (own) states = std::max(states, lanes * (item.head_end - item.head_begin));
    }
    return kernels().tree_attention_scratch(max_hull * group, args.num_kv_heads, states, args.head_dim,
                                            args.format != KvFormat::plain);
}

// Work items are claimed one by one, most expensive first. It does not matter which thread runs one.
void run_items(const TreeAttentionArgs& args, const std::vector<WorkItem>& items, int64_t max_hull,
               const Tensor& like) {
    const auto count = static_cast<int64_t>(items.size());
    const int64_t threads = threads_for(count, count), size = scratch_size(args, items, max_hull);
    Tensor scratch = empty(like, {threads * size + kAlign}, ScalarType::Float);
    float* base = aligned(data<float>(scratch));
    for_units(count, threads, [&](int64_t i, int64_t who) {
        kernels().tree_attention(args, items[static_cast<size_t>(i)], base + who * size);
    });
}

void run_merge(const TreeAttentionArgs& args, const Tensor& like) {
    const int64_t batches = divide_up(args.num_rows, kMergeRows), threads = threads_for(batches, batches);
    const int64_t size = 2 * args.padded_dim;
    Tensor scratch = empty(like, {threads * size}, ScalarType::Float);
    float* base = data<float>(scratch);
    for_units(batches, threads, [&](int64_t batch, int64_t who) {
        const int64_t begin = batch * kMergeRows, end = std::min(begin + kMergeRows, args.num_rows);
        kernels().tree_attention_merge(args, begin, end, base + who * size);
    });
}

}  // namespace

std::tuple<Tensor, Tensor> tree_attention(
    const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache, const Tensor& rows,
    const Tensor& positions, const Tensor& pages, const Tensor& segments, const Tensor& tasks,
    const Tensor& merge_indptr, const Tensor& merge_slots, const Tensor& sizes, int64_t page_size,
    int64_t num_kv_heads, int64_t max_slots, double scale, double softcap, int64_t window,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, const std::optional<Tensor>& k_zero,
    const std::optional<Tensor>& v_zero) {
    const Tensor q = q_in.dim() == 3 && rows_contiguous(q_in) ? q_in : dense(q_in);
    PlanTensors plan{rows,         positions,   pages, segments,  tasks,
                     merge_indptr, merge_slots, sizes, page_size, max_slots};
    const LayerCaches caches(k_cache, v_cache, q.scalar_type(), {k_scale, v_scale, k_zero, v_zero});
    check_tensors(q, caches, plan, num_kv_heads);
    require(std::isfinite(scale) && std::isfinite(softcap) && softcap >= 0.0, "scale, softcap");
    TreeAttentionArgs args{.dtype = dtype(q),
                           .q = q.const_data_ptr(),
                           .q_row_stride = q.stride(0),
                           .q_head_stride = q.stride(1),
                           .k = paged(k_cache),
                           .v = paged(v_cache),
                           .page_size = page_size,
                           .num_rows = q.size(0),
                           .num_q_heads = q.size(1),
                           .num_kv_heads = num_kv_heads,
                           .head_dim = q.size(2),
                           .rows = nullptr,
                           .positions = nullptr,
                           .pages = nullptr,
                           .segments = nullptr,
                           .tasks = nullptr,
                           .merge_indptr = nullptr,
                           .merge_slots = nullptr,
                           .scale = static_cast<float>(scale),
                           .softcap = static_cast<float>(softcap),
                           .window = std::max<int64_t>(window, 0),
                           .sinks = sink_logits(sinks, q.size(1)),
                           .out = nullptr,
                           .lse = nullptr,
                           .partial_rows = nullptr,
                           .partial_states = nullptr,
                           .padded_dim = round_up(q.size(2), kRowAlign),
                           .format = caches.format,
                           .k_scales = caches.k_scales,
                           .v_scales = caches.v_scales};
    plan.check(args, k_cache.size(0));
    Tensor out = empty(q, {args.num_rows, args.num_q_heads, args.head_dim}, q.scalar_type());
    Tensor lse = empty(q, {args.num_rows, args.num_q_heads}, ScalarType::Float);
    if (args.num_rows * args.num_q_heads == 0) return {out, lse};
    const int64_t partials = plan.num_slots * args.num_q_heads;
    Tensor workspace = empty(q, {partials * (args.padded_dim + 2) + kAlign}, ScalarType::Float);
    args.out = out.mutable_data_ptr();
    args.lse = data<float>(lse);
    args.partial_rows = aligned(data<float>(workspace));
    args.partial_states = args.partial_rows + partials * args.padded_dim;
    if (plan.num_tasks > 0) run_items(args, work_items(args, plan.num_tasks), plan.max_hull, q);
    run_merge(args, q);
    return {out, lse};
}

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def(
        "tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor rows, Tensor positions, Tensor "
        "pages, "
        "Tensor segments, Tensor tasks, Tensor merge_indptr, Tensor merge_slots, Tensor sizes, int "
        "page_size, "
        "int num_kv_heads, int max_slots, float scale, float softcap, int window, Tensor? sinks, Tensor? "
        "k_scale=None, Tensor? v_scale=None, Tensor? k_zero=None, Tensor? v_zero=None) -> (Tensor out, "
        "Tensor "
        "lse)");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("tree_attention", TTS_BOX(&tree_attention)); }

}  // namespace tts::ops
