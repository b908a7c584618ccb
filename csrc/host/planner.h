// The attention planner: it cuts attention over a tree of KV nodes into tasks. A token that many branches
// share is read from memory once for all of them (except in the last part of a block of keys in which
// branches fork), and the cut never changes a bit of a row's result (plan.h).
//
// The query rows of branches are put in depth-first order of the tree; then the rows below any node are one
// range. "Row" below always means a position in this order. A *segment* is a stretch of keys and the range of
// rows that read it. A *task* is a list of segments that one thread processes for one KV head, with an
// online-softmax state for each row. If several tasks have read a row's keys, their partial states are
// merged.
//
// The cut never depends on the number of threads:
//   1. Rows are divided into blocks, so that a task's states stay in cache. A block ends where neighbouring
//      rows share the fewest keys.
//   2. The keys that the rows of a block read are divided into *parts*, in depth-first order: a part is a
//      stretch of keys, up to the last whole block of keys that its rows share, cut at multiples of a chunk
//      of positions. Keys that no row sees, because of its position or the window, are left out.
//   3. A block's parts are grouped into tasks of about equal cost, most expensive first in the plan. Narrow
//      parts, which are read by so few rows that memory limits the speed, are grouped together. A task is a
//      work item for each KV head; a task of narrow parts is one item for all heads, which reads whole
//      tokens. Cost of a part and head = tokens * max(rows * group, 24) + overhead.
//   4. States: if one task has a whole chunk, and all chunks before it of the same rows, the chunk is merged
//      into the task's own state. Rows with all their keys in one task need no slot. Other chunks have slots.
//      If a chunk continues in another task, each block of keys there is a state in its own slot.
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

// Parameters of the cut. The default values are those of the CPU kernels.
struct PlanRules {
    int64_t max_query_rows = 512;  // rows * group of a task: float32 states of 512 x 128 are 256 KB
    int64_t work_items = 32;       // the number of work items to aim at
    int64_t min_item_cost = 1 << 16;
    int64_t narrow_query_rows = kNarrow;  // largest rows * group of a narrow segment
    int64_t min_query_rows = 24;  // rows * group below which reading keys costs more than the arithmetic
    int64_t chunk = 512;          // positions; a multiple of kKeyBlock. Results depend on it
    int64_t segment_overhead = 1024;
};

// The parameters of the CUDA kernels: a task and KV head is a thread block. Reading keys costs more than the
// arithmetic up to a whole tile of 128 query rows, so a task costs its tokens. About 1024 work items are
// eight rounds on an H100's 132 SMs. With fewer than 256 tokens (128 KB at 128 bfloat16 a head), starting a
// block and merging its result would be too large a part of the cost. No task is for all heads at once.
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

// A plan in the form for kernels: fields one after another in one int32 buffer, each with room to grow.
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

// Plans attention for the tree's branches. Branch b has q_lens[b] query rows, the last of which is its newest
// token (without q_lens: one row each, also for an empty branch). O(branches + rows + nodes + pages).
PlanBuffer plan_attention(const PlanTree& tree, std::optional<std::span<const int64_t>> q_lens,
                          const PlanShape& shape);

// Writes a plan into an earlier plan's buffer. If it does not fit, throws std::invalid_argument and writes
// nothing.
void refill_plan(const PlanTree& tree, std::optional<std::span<const int64_t>> q_lens, const PlanShape& shape,
                 PlanBuffer& out);

}  // namespace tts
