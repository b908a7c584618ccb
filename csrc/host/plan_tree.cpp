#include "plan_tree.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace tts {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

int64_t pages_of(int64_t tokens, int64_t page_size) { return tokens == 0 ? 0 : (tokens - 1) / page_size + 1; }

void check_lengths(const PageTableView& table, std::span<const int64_t> kv_lens, int64_t page_size) {
    if (static_cast<int64_t>(kv_lens.size()) != table.rows) {
        throw std::invalid_argument("kv_lens: expected one for each row of page_table, " +
                                    std::to_string(table.rows) + ", got " + std::to_string(kv_lens.size()));
    }
    const int64_t longest = table.width <= kMaxInt32 / page_size ? table.width * page_size : kMaxInt32;
    for (size_t b = 0; b < kv_lens.size(); ++b) {
        if (kv_lens[b] >= 0 && kv_lens[b] <= longest) continue;
        throw std::invalid_argument("kv_lens[" + std::to_string(b) + "]: expected 0 to " +
                                    std::to_string(longest) + " (the table's width in tokens), got " +
                                    std::to_string(kv_lens[b]));
    }
}

// The first `columns` entries of a row as int32.
template <class Item>
void read_row(const PageTableView& table, int64_t row, int64_t columns, int32_t* pages) {
    const Item* item = static_cast<const Item*>(table.data) + row * table.row_stride;
    bool valid = true;
    for (int64_t c = 0; c < columns; ++c) {
        const int64_t page = item[c * table.column_stride];
        valid &= page >= 0 && page <= kMaxInt32;
        pages[c] = static_cast<int32_t>(page);
    }
    if (valid) return;
    for (int64_t c = 0; c < columns; ++c) {
        const int64_t page = item[c * table.column_stride];
        if (page >= 0 && page <= kMaxInt32) continue;
        throw std::out_of_range("page_table[" + std::to_string(row) + ", " + std::to_string(c) +
                                "]: expected a page, at least 0, got " + std::to_string(page));
    }
}

// The number of equal leading entries of two lists.
size_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b) {
    constexpr size_t kStep = 64;  // memcmp is many times faster than a loop with an exit at every entry
    const size_t n = std::min(a.size(), b.size());
    size_t i = 0;
    while (i + kStep <= n && std::memcmp(&a[i], &b[i], kStep * sizeof(int32_t)) == 0) i += kStep;
    while (i < n && a[i] == b[i]) ++i;
    return i;
}

// A radix tree over the rows of a page table.
class PrefixTree {
  public:
    explicit PrefixTree(PlanTree& tree) : nodes_(tree.nodes) {}

    // The node in which a branch with these pages (at least one) ends.
    int32_t insert(std::span<const int32_t> pages) {
        int32_t node = -1;
        size_t column = 0;
        while (column < pages.size()) {
            const auto rest = pages.subspan(column);
            const auto [child, is_new] = children_.try_emplace(key(node, rest[0]), next());
            if (is_new) return add(node, column, rest);
            const size_t common = common_prefix(nodes_[child->second].pages, rest);
            node = common < nodes_[child->second].pages.size() ? split(child->second, common) : child->second;
            column += common;
        }
        return node;
    }

  private:
    int32_t next() const { return static_cast<int32_t>(nodes_.size()); }
    static uint64_t key(int32_t node, int32_t page) {
        return static_cast<uint64_t>(static_cast<uint32_t>(node)) << 32 | static_cast<uint32_t>(page);
    }
    int32_t add(int32_t parent, size_t column, std::span<const int32_t> pages) {
        nodes_.push_back({parent, static_cast<int32_t>(column), pages});
        return next() - 1;
    }

    // Cuts a node after `count` pages. These become a new node above it, which is returned.
    int32_t split(int32_t node, size_t count) {
        const PlanTree::Node old = nodes_[node];
        const int32_t upper = add(old.parent, static_cast<size_t>(old.first_column), old.pages.first(count));
        nodes_[node] = {upper, old.first_column + static_cast<int32_t>(count), old.pages.subspan(count)};
        children_[key(old.parent, old.pages[0])] = upper;
        children_[key(upper, nodes_[node].pages[0])] = node;
        return upper;
    }

    std::vector<PlanTree::Node>& nodes_;
    std::unordered_map<uint64_t, int32_t> children_;  // (node, first page of the child) -> child
};

}  // namespace

PlanTree shared_prefixes(const PageTableView& table, std::span<const int64_t> kv_lens, int64_t page_size) {
    check_lengths(table, kv_lens, page_size);
    PlanTree tree;
    size_t total = 0;
    for (const int64_t length : kv_lens) total += static_cast<size_t>(pages_of(length, page_size));
    tree.storage.resize(total);  // resized only once, because nodes point into it
    int32_t* pages = tree.storage.data();
    PrefixTree prefixes(tree);
    for (size_t b = 0; b < kv_lens.size(); ++b) {
        const int64_t columns = pages_of(kv_lens[b], page_size), row = static_cast<int64_t>(b);
        if (table.item_size == 4) {
            read_row<int32_t>(table, row, columns, pages);
        } else {
            read_row<int64_t>(table, row, columns, pages);
        }
        tree.kv_lens.push_back(static_cast<int32_t>(kv_lens[b]));
        tree.leaf.push_back(prefixes.insert({pages, static_cast<size_t>(columns)}));
        pages += columns;
    }
    return tree;
}

}  // namespace tts
