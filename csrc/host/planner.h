// The attention planner: cuts attention over a tree of KV nodes into tasks, so that a token which many
// branches share is read from memory once for all of them (but for the last part of a block of keys within
// which branches part), and so that no cut changes a bit of a row's result (plan.h).
//
// Branches' query rows are put in depth-first order of the tree; then the rows below any node are one range.
// "Row" below always means a position in that order. A *segment* is a stretch of keys and the range of rows
// that read it; a *task* is a list of segments that one thread works through for one KV head, keeping an
// online-softmax state for each row; a row that several tasks have read is merged from their partial states.
//
// The cut never depends on the number of threads:
//   1. Rows are blocked so that a task's states stay in cache. A block ends where neighbours share the least.
//   2. What the rows of a block read becomes *parts*, in depth-first order: a stretch of keys, up to the last
//      whole block of keys that its rows share, cut at multiples of a chunk of positions. Keys that no row
//      sees, by its position or the window, are left out.
//   3. A block's parts are gathered into tasks of about equal cost, dearest first in the plan; the narrow
//      ones, read by so few rows that the memory is the bound, go together. A task is a work item for each
//      KV head; one of narrow parts is one item for all heads, which reads whole tokens.
//      Cost of a part and head = tokens * max(rows * group, 24) + overhead.
//   4. States: a chunk that one task has whole, like all before it of its rows, joins the task's own state;
//      rows of which one task has everything need no slot. Other chunks get slots. Where a chunk goes on in
//      another task, there each block of keys is a state in a slot of its own.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "int_buffer.h"
#include "plan.h"
#include "plan_tree.h"

namespace tts {

// How the work is cut. The numbers here are those of the CPU kernels.
struct PlanRules {
    int64_t max_query_rows = 512;  // rows * group of a task: float32 states of 512 x 128 are 256 KB
    int64_t work_items = 32;       // to aim at
    int64_t min_item_cost = 1 << 16;
    int64_t narrow_query_rows = kNarrow;  // rows * group up to which a segment is narrow
    int64_t min_query_rows = 24;  // rows * group below which reading keys costs more than the arithmetic
    int64_t chunk = 512;          // positions; a multiple of kKeyBlock. Results depend on it
    int64_t segment_overhead = 1024;
};

// Those of the CUDA kernels: a task and KV head is a thread block. Reading keys costs more than the
// arithmetic up to a whole tile of 128 query rows, so a task costs its tokens; about 1024 of them are eight
// rounds of an H100's 132 SMs; below 256 tokens (128 KB at 128 bfloat16 a head) starting
// a block and merging its result cost too much of it. No task is for all heads at once.
inline constexpr PlanRules kGpuRules{.max_query_rows = 128,
                                     .work_items = 1024,
                                     .min_item_cost = 256 * 128,
                                     .narrow_query_rows = 0,
                                     .min_query_rows = 128,
                                     .chunk = 256,
                                     .segment_overhead = 64 * 128};

struct PlanShape {
    int64_t page_size, num_q_heads, num_kv_heads;
    PlanRules rules = {};
    int64_t window = 0;  // a row at position i sees i - window + 1 to i; 0: all up to i
};

// A plan as the kernels read it: fields one after another in one int32 buffer, each with room to grow.
class PlanBuffer {
  public:
    enum Field {
        kSizes,
        kRows,
        kPositions,
        kMergeIndptr,
        kTasks,
        kSegments,
        kMergeSlots,
        kPages,
        kNumFields
    };
    using Lengths = std::array<int64_t, kNumFields>;  // of each field, in int32

    PlanBuffer(const Lengths& lengths, int64_t max_slots);

    const Lengths& lengths() const { return lengths_; }
    int64_t max_slots() const { return max_slots_; }
    int64_t num_rows() const { return lengths_[kRows]; }
    IntBuffer& data() { return data_; }
    std::span<int32_t> field(Field f) {
        return data_.span().subspan(static_cast<size_t>(begins_[f]), static_cast<size_t>(lengths_[f]));
    }

  private:
    Lengths lengths_, begins_;
    int64_t max_slots_;
    IntBuffer data_;
};

// Plans attention of the tree's branches, q_lens[b] query rows each, the last of which is the branch's newest
// token (without q_lens: one row each, also for an empty branch). O(branches + rows + nodes + pages).
PlanBuffer plan_attention(const PlanTree& tree, std::optional<std::span<const int64_t>> q_lens,
                          const PlanShape& shape);

// The same into an earlier plan's buffer. Throws std::invalid_argument, having written nothing, if it does
// not fit.
void refill_plan(const PlanTree& tree, std::optional<std::span<const int64_t>> q_lens, const PlanShape& shape,
                 PlanBuffer& out);

}  // namespace tts
