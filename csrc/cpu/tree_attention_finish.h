// Computes results from states.
#pragma once

#include "tree_attention_item.h"

TTS_BEGIN_ISA

// Adds the sink of a head to the state: a weight without a value.
inline SoftmaxState with_sink(const TreeAttentionArgs& args, int64_t head, const StateRef& from,
                              float* factor) {
    *factor = 1.0f;
    if (!args.sinks) return from.state;
    const MergeWeights w = merge(from.state, {args.sinks[head] * kLog2E, 1.0f});
    *factor = w.a;
    return w.state;
}

// out = row / sum; the empty state gives 0. A zero becomes +0. Its sign in a row comes only from signs of
// zeros, which may be those of keys that only other rows see (merge_rows).
template <class T>
inline void write_result(const TreeAttentionArgs& args, int64_t row, int64_t head, const StateRef& from) {
    constexpr int W = Vec::width;
    const int64_t index = args.rows[row] * args.num_q_heads + head, dim = args.head_dim;
    T* out = static_cast<T*>(args.out) + index * dim;
    float kept;
    const SoftmaxState state = with_sink(args, head, from, &kept);
    args.lse[index] = state.lse();
    const bool empty = from.state.empty();
    const Vec factor = Vec::all(kept / state.sum);
    for (int64_t d = 0; d < dim; d += W) {
        const int n = dim - d < W ? static_cast<int>(dim - d) : W;
        const Vec x = empty ? Vec::zero() : Vec::load(from.row + d, n) * factor + Vec::zero();
        n < W ? x.store(out + d, n) : x.store(out + d);
    }
}

// Writes the task's own states: the results of rows that are not merged, and the first states of the others.
template <class T>
inline void finish_rows(const Item<T>& item) {
    const TreeAttentionArgs& args = item.args;
    for (int64_t lane = 0; lane < item.lanes; ++lane) {
        if (!item.begun(lane)) continue;
        item.end_chunk(lane);
        const int64_t row = item.row_of(lane), head = item.head_of(lane);
        if (is_merged(args, row)) {
            const StateRef to = slot_ref(args, item.task.slot + row - item.task.row_begin, head);
            to.copy(item.own(lane), args.head_dim);
        } else {
            write_result<T>(args, row, head, item.own(lane));
        }
    }
}

TTS_END_ISA
