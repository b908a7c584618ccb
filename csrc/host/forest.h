// The KV forest: it knows which pages of a KV cache the branches of all search trees in flight read.
//
// A branch is a sequence of tokens. Its KV lies in pages of `page_size` token slots, and branches that were
// forked from each other share the pages of their common prefix. The forest is a tree of page *runs*:
//
//     run 0 [p0 p1 p2] --+-- run 1 [p3]          branch 10: run 1, 60 tokens
//                        +-- run 2 [p4 p5]       branch 11: run 2, 80 tokens;  branch 12: run 2, 77 tokens
//
// Invariants:
//   * A branch is (run, length) and ends in the last page of its run; an empty branch has no run.
//   * A page belongs to exactly one run; so references are counted on runs, and a fork costs O(1).
//   * refs(run) = its branches + its child runs >= 1. If the only reference of a run is a child run, the two
//     are joined immediately. So there are fewer than two runs per branch, even in a long chain of forks.
//   * A run with child runs is full: its pages have no free slots for the branches below. A shorter branch
//     may end in it.
//   * No function is recursive.
//   * An operation that throws has changed nothing: all memory is reserved before anything is changed.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "int_buffer.h"
#include "plan_tree.h"

namespace tts {

// An append needs more pages than are free.
class OutOfPages : public std::runtime_error {
  public:
    OutOfPages(int64_t needed, int64_t free)
        : std::runtime_error("out of pages: " + std::to_string(needed) + " needed, " + std::to_string(free) +
                             " free"),
          needed(needed),
          free(free) {}
    int64_t needed, free;
};

// The slots of an append's tokens.
struct Append {
    IntBuffer slots;               // [sum(counts)] page * page_size + offset, entry by entry
    IntBuffer copy_src, copy_dst;  // pages to copy, before anything is written to the slots
};

struct PageTable {
    IntBuffer pages;    // [branches, width], padded with -1
    IntBuffer lengths;  // [branches]
    int64_t width = 0;
};

struct ForestStats {
    int64_t branches, pages_total, pages_free;
    int64_t logical_tokens;  // sum of the branches' lengths
    int64_t unique_tokens;   // slots that some branch reads
};

struct Branch {
    static constexpr int32_t kEmpty = -1, kDead = -2;  // values of `run`
    int32_t run = kDead;
    int32_t length = 0;
    uint64_t mark = 0;  // the last operation that named this branch, to find duplicates
};

// Branches by id. Ids count up from 0 and are never reused, so an outdated id is always detected. A lookup
// takes two loads. Ids are in blocks, and a block is freed when the last of its branches is removed.
class BranchTable {
  public:
    void reserve(int64_t count);  // after this, so many calls of `add` will not throw
    int64_t add(int32_t run, int32_t length);
    void remove(int64_t id);
    Branch* find(int64_t id);  // null if there is no such branch
    const Branch* find(int64_t id) const { return const_cast<BranchTable*>(this)->find(id); }
    bool was_issued(int64_t id) const { return id >= 0 && id < next_id_; }
    int64_t size() const { return size_; }

    template <class Visit>
    void for_each(Visit visit) const {
        for (size_t i = first_; i < blocks_.size(); ++i) {
            if (!blocks_[i]) continue;
            for (const Branch& branch : blocks_[i]->branches) {
                if (branch.run != Branch::kDead) visit(branch);
            }
        }
    }

  private:
    static constexpr int64_t kBlock = 256;
    struct Block {
        std::array<Branch, kBlock> branches;
        int64_t live = 0;
    };
    std::vector<std::unique_ptr<Block>> blocks_;
    size_t first_ = 0;  // blocks before it are gone
    int64_t next_id_ = 0;
    int64_t size_ = 0;
};

// The free pages. The most recently freed ones are used first, and new ones last.
class PagePool {
  public:
    explicit PagePool(int64_t total) : total_(total) {}
    int64_t total() const { return total_; }
    int64_t available() const { return total_ - fresh_ + static_cast<int64_t>(returned_.size()); }
    void reserve(int64_t pages);  // reserves memory to take this many pages, and to free all
    int32_t take();
    void give_back(std::span<const int32_t> pages) noexcept {
        returned_.insert(returned_.end(), pages.rbegin(), pages.rend());
    }

  private:
    int64_t total_;
    int64_t fresh_ = 0;  // pages fresh_..total_-1 were never used
    std::vector<int32_t> returned_;
};

class Forest {
  public:
    Forest(int64_t num_pages, int64_t page_size);

    int64_t add_root();

    // Gives branch i counts[i] more tokens. O(entries + tokens). Entries are served in order: a shared,
    // partly filled last page is copied for each branch except its last user.
    Append append(std::span<const int64_t> branches, std::span<const int64_t> counts);

    // One child for each entry. O(1) each.
    std::vector<int64_t> fork(std::span<const int64_t> parents);

    // O(1) for each branch, and for each page without another user.
    void free(std::span<const int64_t> branches);

    // Keeps the first `length` tokens. O(runs of the branch + pages after the cut).
    void truncate(int64_t branch, int64_t length);

    int64_t length(int64_t branch) const;
    PageTable page_table(std::span<const int64_t> branches) const;
    ForestStats stats() const;
    int64_t page_size() const { return page_size_; }

    // The runs that these branches read, for the planner. Its pages point into the forest.
    PlanTree plan_tree(std::span<const int64_t> branches) const;

  private:
    static constexpr int32_t kNone = -1;

    struct Run {
        std::vector<int32_t> pages;
        int32_t parent = kNone;
        int32_t first_column = 0;  // pages of a branch before this run
        int32_t refs = 0;          // branches that end here + child runs
        int32_t children = 0;      // child runs
        int32_t child_xor = 0;     // XOR of their indices: with one child, the child
        int32_t scratch = 0;       // for the operation in `mark`
        uint64_t mark = 0;
    };

    // Returns the branch, or throws an error with the argument's name (and index i, if it has entries).
    Branch& live(int64_t id, const char* name, int64_t i = -1);
    const Branch& live(int64_t id, const char* name, int64_t i = -1) const {
        return const_cast<Forest*>(this)->live(id, name, i);
    }
    Branch& live_once(int64_t id, const char* name, int64_t i);  // and not named before in this operation
    void check_live(std::span<const int64_t> branches, const char* name) const;
    int64_t columns(int64_t length) const { return (length + page_size_ - 1) / page_size_; }
    int32_t end_column(const Run& run) const {
        return run.first_column + static_cast<int32_t>(run.pages.size());
    }

    struct Demand {
        int64_t tokens = 0, pages = 0, copies = 0;
    };
    Demand demand(std::span<const int64_t> branches, std::span<const int64_t> counts);
    bool copies_tail(const Branch& branch);
    int64_t new_pages(const Branch& branch, int64_t count) const;

    // The memory that one entry of an append will need.
    struct Spare {
        size_t entry;
        std::vector<int32_t> pages;  // of its new run
        std::vector<int32_t> rest;   // of what a split leaves
    };
    std::vector<Spare> reserve(std::span<const int64_t> branches, std::span<const int64_t> counts,
                               const Demand& total);
    void grow(Branch& branch, int32_t count, std::vector<int32_t> list) noexcept;
    void write_slots(const Branch& branch, int32_t count, int32_t* slots) const;

    void reserve_runs(int64_t count);
    int32_t new_run(int32_t parent, int32_t first_column) noexcept;
    void add_child(int32_t parent, int32_t child);
    void remove_child(int32_t parent, int32_t child);
    void drop(int32_t run) noexcept;
    void join_with_child(int32_t run) noexcept;
    int32_t split(int32_t run, size_t count, std::vector<int32_t> rest) noexcept;
    std::pair<int32_t, int32_t> copy_tail(Branch& branch, Spare& spare) noexcept;

    int64_t page_size_;
    PagePool pool_;
    BranchTable branches_;
    mutable std::vector<Run> runs_;  // mutable because the planner leaves marks in it
    std::vector<int32_t> free_runs_;
    int64_t logical_tokens_ = 0;
    mutable uint64_t operation_ = 0;
};

}  // namespace tts
