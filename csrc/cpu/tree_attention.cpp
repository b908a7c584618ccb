// tree_attention: attention of many branches over a tree of KV pages. Each shared token is read once for all
// of them.
//
//   q [T, Hq, D], caches [P, page_size, Hkv, D], plan  ->  out [T, Hq, D], lse [T, Hq]
//
// The planner (csrc/host) orders the rows depth first, so the rows that read the same keys form one range,
// and cuts the tree into tasks of equal cost. A work item is a task for one KV head, or for several if
// reading keys limits the speed. It runs its segments in order: tree_attention_tiles.h for many lanes with
// the same keys, tree_attention_rows.h for few. Both compute the same sums. Quantised keys and values are
// decoded to q's type block by block, once for all lanes of a segment. plan.h defines the order of all sums.
// Until they are complete, states are stored where the plan says: in the task, or in a slot of the workspace.
// If one task has all keys of a row, it finishes the row; other rows are merged by a second pass. So a row's
// result depends on its query and the keys that it sees, and not on other rows, the cut, or threads.
#include "tree_attention.h"

#include "tree_attention_finish.h"
#include "tree_attention_rows.h"
#include "tree_attention_tiles.h"

TTS_BEGIN_ISA

namespace {

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
        finish_rows(item);
    }
}

// The partial states of one row and head, in the plan's order.
template <class T>
void merge_row(const TreeAttentionArgs& args, int64_t row, int64_t head, const StateRef& own,
               const StateRef& chunk) {
    own.clear(args.head_dim), chunk.clear(args.head_dim);
    for (int64_t i = args.merge_indptr[row]; i < args.merge_indptr[row + 1]; ++i) {
        const int32_t entry = args.merge_slots[i];
        if (!continues(entry)) {
            own.absorb(chunk, args.head_dim);
            chunk.clear(args.head_dim);
        }
        chunk.absorb(slot_ref(args, slot_of(entry), head), args.head_dim);
    }
    own.absorb(chunk, args.head_dim);
    write_result<T>(args, row, head, own);
}

}  // namespace

int64_t tree_attention_scratch(int64_t lanes, int64_t num_kv_heads, int64_t states, int64_t head_dim,
                               bool quantized) {
    return Scratch(nullptr, lanes, num_kv_heads, states, head_dim, quantized).size();
}

void tree_attention(const TreeAttentionArgs& args, WorkItem item, float* scratch) {
    dispatch(args.dtype, [&]<class T>(T*) { run_item<T>(args, item, scratch); });
}

void tree_attention_merge(const TreeAttentionArgs& args, int64_t begin, int64_t end, float* scratch) {
    SoftmaxState states[2];
    const StateRef own{states[0], scratch}, chunk{states[1], scratch + args.padded_dim};
    dispatch(args.dtype, [&]<class T>(T*) {
        for (int64_t row = begin; row < end; ++row) {
            if (!is_merged(args, row) && args.positions[row] >= 0) continue;  // its task has written it
            for (int64_t head = 0; head < args.num_q_heads; ++head) merge_row<T>(args, row, head, own, chunk);
        }
    });
}

TTS_END_ISA
