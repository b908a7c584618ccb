// tree_attention: attention of many branches over a tree of KV pages, each shared token read once for all of
// them.
//
//   q [T, Hq, D], caches [P, page_size, Hkv, D], plan  ->  out [T, Hq, D], lse [T, Hq]
//
// The planner (csrc/host) orders the rows depth first, so the rows that read a stretch of keys are one range,
// and cuts the tree into tasks of equal cost. A work item is a task for one KV head. It runs its segments in
// order on one online softmax state a lane (online_softmax.h): tree_attention_tiles.h where many lanes read
// the same keys, tree_attention_rows.h where few do. A row that only one task reads is finished there; the
// others leave a partial state, merged in the plan's order by a second pass. An item's result depends on
// nothing but its inputs, so neither the number of threads nor who runs what changes a bit.
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

// A lane's state to where the plan wants it: straight to out if this task alone reads the row, else to its
// slot.
template <class T>
void write_lane(const Item<T>& item, int64_t lane) {
    const TreeAttentionArgs& args = item.args;
    const int64_t offset = lane / item.group, row = item.task.row_begin + offset,
                  slot = item.task.slot + offset;
    const int64_t slots = num_slots(args, row), head = item.kv_head * item.group + lane % item.group;
    const SoftmaxState state = item.scratch.state[lane];
    const float* from = item.scratch.row + lane * item.scratch.dim_pad;
    if (slots == 1 && args.merge_slots[args.merge_indptr[row]] == slot) {
        write_result<T>(args, args.rows[row], head, state, from);
    } else if (slots > 1) {
        const int64_t index = slot * args.num_q_heads + head;
        args.partial_states[2 * index] = state.max;
        args.partial_states[2 * index + 1] = state.sum;
        float* to = args.partial_rows + index * args.head_dim;
        if (!state.empty()) __builtin_memcpy(to, from, sizeof(float) * static_cast<uint64_t>(args.head_dim));
    }
}

template <class T>
void run_item(const TreeAttentionArgs& args, const Task& task, int64_t kv_head, float* base) {
    const int64_t group = args.num_q_heads / args.num_kv_heads,
                  lanes = (task.row_end - task.row_begin) * group;
    Item<T> item{args, task, kv_head, group, Scratch(base, lanes, args.head_dim)};
    for (int64_t lane = 0; lane < lanes; ++lane) item.scratch.state[lane] = SoftmaxState{};
    for (int64_t i = task.seg_begin; i < task.seg_end; ++i) {
        const Segment& segment = args.segments[i];
        if ((segment.row_end - segment.row_begin) * group <= kNarrow) {
            Rows<T>(item, segment).run();
        } else {
            Tiles<T>(item, segment).run();
        }
    }
    for (int64_t lane = 0; lane < lanes; ++lane) write_lane(item, lane);
}

SoftmaxState partial_state(const TreeAttentionArgs& args, int64_t slot, int64_t head) {
    const float* p = args.partial_states + 2 * (slot * args.num_q_heads + head);
    return {p[0], p[1]};
}

// The partial states of one row and head, in the plan's order: the states first, then the rows by their final
// weights.
template <class T>
void merge_row(const TreeAttentionArgs& args, int64_t row, int64_t head, float* sum) {
    constexpr int W = Vec::width;
    const int32_t *slots = args.merge_slots + args.merge_indptr[row],
                  *end = args.merge_slots + args.merge_indptr[row + 1];
    const int64_t dim = args.head_dim;
    SoftmaxState state;
    for (const int32_t* s = slots; s < end; ++s) state = merge(state, partial_state(args, *s, head)).state;
    for (int64_t d = 0; d < dim; d += W) Vec::zero().store(sum + d);
    for (const int32_t* s = slots; s < end; ++s) {
        const SoftmaxState part = partial_state(args, *s, head);
        if (part.empty()) continue;
        const Vec factor = Vec::all(weight(part.max, state.max));
        const float* from = args.partial_rows + (*s * args.num_q_heads + head) * dim;
        for (int64_t d = 0; d < dim; d += W) {
            const Vec x = dim - d < W ? Vec::load(from + d, static_cast<int>(dim - d)) : Vec::load(from + d);
            fma(x, factor, Vec::load(sum + d)).store(sum + d);
        }
    }
    write_result<T>(args, args.rows[row], head, state, sum);
}

}  // namespace

int64_t tree_attention_scratch(int64_t lanes, int64_t head_dim) {
    return Scratch(nullptr, lanes, head_dim).size();
}

void tree_attention(const TreeAttentionArgs& args, int64_t item, float* scratch) {
    const Task& task = args.tasks[item / args.num_kv_heads];
    dispatch(args.dtype, [&]<class T>(T*) { run_item<T>(args, task, item % args.num_kv_heads, scratch); });
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
