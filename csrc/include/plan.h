// The attention plan's int32 tables: what the planner (csrc/host) writes and every attention kernel reads.
// tts_kernels/plan.py explains the fields. "Row" means a position in the plan's rows.
#pragma once

#include <cstdint>

namespace tts {

struct Segment {
    int32_t page_begin;  // its first page, as an index into the plan's pages
    int32_t start;       // position of its first token, a multiple of page_size
    int32_t length;      // tokens
    int32_t row_begin, row_end;
};

struct Task {
    int32_t seg_begin, seg_end;
    int32_t row_begin, row_end;  // hull of its segments' rows
    int32_t slot;                // of row_begin; row r's partial state is slot + r - row_begin
};

// How much of the tables is in use.
struct PlanSizes {
    int32_t segments, tasks, slots, pages;
};

// Ints in a record of either table, and of the sizes.
inline constexpr int64_t kPlanRecord = sizeof(Segment) / sizeof(int32_t);
inline constexpr int64_t kPlanSizes = sizeof(PlanSizes) / sizeof(int32_t);
static_assert(sizeof(Task) == sizeof(Segment));

// Lanes (rows x query heads of a KV head) up to which a segment is narrow on a CPU: bound by reading its
// keys, not by arithmetic. The planner keeps narrow segments to themselves, and the kernels take all heads of
// one at once.
inline constexpr int64_t kNarrow = 8;

}  // namespace tts
