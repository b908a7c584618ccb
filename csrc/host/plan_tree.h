// The input of the attention planner: a tree of KV nodes, and the branches that end in them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tts {

struct PlanTree {
    struct Node {
        int32_t parent = -1;             // index in `nodes`, in any order; -1 for a root
        int32_t first_column = 0;        // pages of a branch before this node
        std::span<const int32_t> pages;  // at least one
    };
    std::vector<Node> nodes;
    std::vector<int32_t> leaf;     // [branches] the node with a branch's last page; -1: empty branch
    std::vector<int32_t> kv_lens;  // [branches]
    std::vector<int32_t> storage;  // pages of `nodes` that no other object owns
};

// Another framework's page table, row-major. Entries after a branch's last page are ignored.
struct PageTableView {
    const void* data;
    int64_t item_size;                  // 4 or 8 bytes: int32 or int64
    int64_t row_stride, column_stride;  // in items
    int64_t rows, width;
};

// The tree of shared prefixes of a page table. Branches share a page if they have it in the same column and
// all columns before are equal. O(table entries).
PlanTree shared_prefixes(const PageTableView& table, std::span<const int64_t> kv_lens, int64_t page_size);

}  // namespace tts
