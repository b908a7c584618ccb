// What the attention planner plans over: a tree of KV nodes and the branches that end in them.
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
    std::vector<int32_t> leaf;     // [branches] the node in whose last page a branch ends; -1: it is empty
    std::vector<int32_t> kv_lens;  // [branches]
    std::vector<int32_t> storage;  // pages that `nodes` point at and nobody else owns
};

// Another framework's page table, row-major; columns behind a branch's last page may hold anything.
struct PageTableView {
    const void* data;
    int64_t item_size;                  // 4 or 8 bytes: int32 or int64
    int64_t row_stride, column_stride;  // in items
    int64_t rows, width;
};

// The tree of shared prefixes of a page table: branches share a page if they have it in the same column and
// agree in every column before. O(table entries).
PlanTree shared_prefixes(const PageTableView& table, std::span<const int64_t> kv_lens, int64_t page_size);

}  // namespace tts
