// tree_attention: attention of many branches over a tree of KV pages, each shared token read once for all of
// them.
//
//   q [T, Hq, D], caches [P, page_size, Hkv, D], plan  ->  out [T, Hq, D], lse [T, Hq]
//
// The planner (csrc/host) orders the rows depth first, so the rows that read a stretch of keys are one range,
// and cuts the tree into tasks of equal cost. A work item is a task for one KV head, or for several where
// reading keys is the bound. It runs its segments in order on one online softmax state a lane
// (online_softmax.h): tree_attention_tiles.h where many lanes read the same keys, tree_attention_rows.h where
// few do. States lie in the task's slots of the workspace. A row that only one task reads is finished there;
// the others are merged in the plan's order by a second pass. An item's result depends on nothing but its
// inputs, so neither the number of threads nor who runs what changes a bit.
#include "tree_attention.h"

#include "tree_attention_rows.h"
#include "tree_attention_tiles.h"

TTS_BEGIN_ISA

namespace {

// out = row / sum; the empty state gives 0.
template <class T>
void write_result(const TreeAttentionArgs& args, int64_t packed_row, int64_t head, SoftmaxState state,
                  const float* row) {
    constexpr int W = Vec::width;
    const int64_t index = packed_row * args.num_q_heads + head, dim = args.head_dim;
    T* out = static_cast<T*>(args.out) + index * dim;
    args.lse[index] = state.lse();
    const Vec factor = Vec::all(1.0f / state.sum);
    for (int64_t d = 0; d < dim; d += W) {
        const int n = dim - d < W ? static_cast<int>(dim - d) : W;
        const Vec x = state.empty() ? Vec::zero() : Vec::load(row + d, n) * factor;
        n < W ? x.store(out + d, n) : x.store(out + d);
    }
}

int64_t num_slots(const TreeAttentionArgs& args, int64_t row) {
    return args.merge_indptr[row + 1] - args.merge_indptr[row];
}

// Writes the results of the rows that no other task reads; the others' states stay for the merge.
template <class T>
void write_results(const Item<T>& item) {
    const TreeAttentionArgs& args = item.args;
    for (int64_t lane = 0; lane < item.lanes; ++lane) {
        const int64_t offset = lane / item.group, row = item.task.row_begin + offset;
        if (num_slots(args, row) != 1) continue;
        if (args.merge_slots[args.merge_indptr[row]] != item.task.slot + offset) continue;
        const int64_t head = item.kv_head * item.group + lane % item.group;
        write_result<T>(args, args.rows[row], head, item.state(lane), item.row(lane));
    }
}

template <class T>
void run_item(const TreeAttentionArgs& args, WorkItem work, float* base) {
    Item<T> item(args, work, base);
    for (int64_t i = item.task.seg_begin; i < item.task.seg_end; ++i) {
        const Segment& segment = args.segments[i];
        if ((segment.row_end - segment.row_begin) * item.group <= kNarrow) {
            Rows<T>(item, segment).run();
            continue;
        }
        for (int64_t head = work.head_begin; head < work.head_end; ++head) {
            item.select(head);
            Tiles<T>(item, segment).run();
        }
    }
    for (int64_t head = work.head_begin; head < work.head_end; ++head) {
        item.select(head);
        write_results(item);
    }
}

// The partial states of one row and head, in the plan's order: the largest max, then sums and rows by weight.
template <class T>
void merge_row(const TreeAttentionArgs& args, int64_t row, int64_t head, float* sum) {
    constexpr int W = Vec::width;
    const int32_t *slots = args.merge_slots + args.merge_indptr[row],
                  *end = args.merge_slots + args.merge_indptr[row + 1];
    const auto* states = reinterpret_cast<const SoftmaxState*>(args.partial_states);
    SoftmaxState state;
    for (const int32_t* s = slots; s < end; ++s) {
        const float max = states[*s * args.num_q_heads + head].max;
        if (max > state.max || is_nan(max)) state.max = max;
    }
    for (int64_t d = 0; d < args.head_dim; d += W) Vec::zero().store(sum + d);
    for (const int32_t* s = slots; s < end; ++s) {
        const int64_t index = *s * args.num_q_heads + head;
        const SoftmaxState part = states[index];
        if (part.empty()) continue;
        const float factor = weight(part.max, state.max);
        state.sum += factor * part.sum;
        const float* from = args.partial_rows + index * args.padded_dim;
        for (int64_t d = 0; d < args.head_dim; d += W) {
            fma(Vec::load(from + d), Vec::all(factor), Vec::load(sum + d)).store(sum + d);
        }
    }
    write_result<T>(args, args.rows[row], head, state, sum);
}

}  // namespace

int64_t tree_attention_scratch(int64_t lanes, int64_t num_kv_heads, int64_t head_dim) {
    return Scratch(nullptr, lanes, num_kv_heads, head_dim).size();
}

void tree_attention(const TreeAttentionArgs& args, WorkItem item, float* scratch) {
    dispatch(args.dtype, [&]<class T>(T*) { run_item<T>(args, item, scratch); });
}

void tree_attention_merge(const TreeAttentionArgs& args, int64_t begin, int64_t end, float* scratch) {
    dispatch(args.dtype, [&]<class T>(T*) {
        for (int64_t row = begin; row < end; ++row) {
            if (num_slots(args, row) == 1) continue;
            for (int64_t head = 0; head < args.num_q_heads; ++head) merge_row<T>(args, row, head, scratch);
        }
    });
}

TTS_END_ISA
