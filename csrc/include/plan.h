// The int32 tables of an attention plan, which the planner (csrc/host) writes and every attention kernel
// reads. tts_kernels/plan.py explains the fields. "Row" means a position in the plan's rows.
//
// How a row's result is computed, so that it depends only on the row and its keys:
//
//   block   kKeyBlock positions, cut at absolute multiples of it. The keys of a block that the row sees make
//           a state from empty; a key that it does not see changes no bit.
//   chunk   a number of blocks (PlanRules::chunk positions, at absolute multiples): C = merge(C, block), in
//           ascending order, from empty
//   row     R = merge(R, C), in ascending order, from empty; then the sink, if there is one
//
// Merging with the empty state changes no bit of a result. So blocks and chunks that a row does not see may
// be included or left out. The plan decides who computes which part: a segment continues a chunk's state or
// begins one, and a state is merged into its task's own R or stays in a slot until the row's states are
// merged.
#pragma once

#include <cstdint>

#include "isa.h"

namespace tts {

// The number of keys in a block. If branches fork within a block, each has the whole block in its own
// segment.
inline constexpr int32_t kKeyBlock = 64;

struct Segment {
    int32_t page_begin;  // the page of its first token, as an index into the plan's pages
    int32_t start;       // position of its first token, which is token start % page_size of that page
    int32_t length;      // tokens, all in the same chunk
    int32_t row_begin, row_end;
    int32_t slot;   // of row_begin's state, row r's is slot + r - row_begin; -1: in the task, to join its R
    int32_t fresh;  // 1: begins a state; 0: continues the rows' state in this slot
};

struct Task {
    int32_t seg_begin, seg_end;
    int32_t row_begin, row_end;  // hull of its segments' rows
    int32_t slot;  // for R of row_begin, R of row r is slot + r - row_begin; -1 if no R of it is to be merged
};

// An entry of merge_slots: the place of a state, and whether it continues the chunk of the entry before it.
TTS_HD constexpr int32_t merge_entry(int32_t slot, bool continues) { return 2 * slot + continues; }
TTS_HD constexpr int32_t slot_of(int32_t entry) { return entry >> 1; }
TTS_HD constexpr bool continues(int32_t entry) { return (entry & 1) != 0; }

// The used sizes of the tables.
struct PlanSizes {
    int32_t segments, tasks, slots, pages;
};

// The number of ints in a record of each table.
inline constexpr int64_t kSegmentInts = sizeof(Segment) / sizeof(int32_t);
inline constexpr int64_t kTaskInts = sizeof(Task) / sizeof(int32_t);
inline constexpr int64_t kPlanSizes = sizeof(PlanSizes) / sizeof(int32_t);

// The largest number of lanes (rows x query heads of a KV head) of a narrow segment on a CPU: its speed is
// limited by reading keys, not by arithmetic. The planner separates narrow segments from others, and the
// kernels process all their heads at once.
inline constexpr int64_t kNarrow = 8;

}  // namespace tts
