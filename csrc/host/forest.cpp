#include "forest.h"

#include <algorithm>
#include <limits>
#include <new>
#include <tuple>

namespace tts {
namespace {

constexpr int64_t kMaxSlots = std::numeric_limits<int32_t>::max();  // slots are int32

[[noreturn]] void bad_value(const std::string& argument, const std::string& expected,
                            const std::string& got) {
    throw std::invalid_argument(argument + ": expected " + expected + ", got " + got);
}

// The name of an argument, or of one of its entries.
std::string entry(const char* name, int64_t i) {
    return i < 0 ? name : std::string(name) + "[" + std::to_string(i) + "]";
}

// Sums of page counts that exceed any pool stay at the largest value.
int64_t saturating_add(int64_t a, int64_t b) {
    int64_t sum;
    return __builtin_add_overflow(a, b, &sum) ? std::numeric_limits<int64_t>::max() : sum;
}

// Makes room for `size` items, growing as push_back does, so that many small steps cost O(1) each.
template <class Item>
void reserve_at_least(std::vector<Item>& list, size_t size) {
    if (list.capacity() < size) list.reserve(std::max(size, 2 * list.capacity()));
}

}  // namespace

// ---- BranchTable -----------------------------------------------------------------------------------------

void BranchTable::reserve(int64_t count) {
    while (static_cast<int64_t>(blocks_.size()) * kBlock < next_id_ + count) {
        blocks_.push_back(std::make_unique<Block>());
    }
}

int64_t BranchTable::add(int32_t run, int32_t length) {
    Block& block = *blocks_[next_id_ / kBlock];
    block.branches[next_id_ % kBlock] = {.run = run, .length = length};
    ++block.live;
    ++size_;
    return next_id_++;
}

void BranchTable::remove(int64_t id) {
    std::unique_ptr<Block>& block = blocks_[id / kBlock];
    block->branches[id % kBlock].run = Branch::kDead;
    --size_;
    const bool full = next_id_ / kBlock > id / kBlock;  // no further id will fall into it
    if (--block->live == 0 && full) block.reset();
    while (first_ < blocks_.size() && !blocks_[first_]) ++first_;
}

Branch* BranchTable::find(int64_t id) {
    if (!was_issued(id) || !blocks_[id / kBlock]) return nullptr;
    Branch& branch = blocks_[id / kBlock]->branches[id % kBlock];
    return branch.run == Branch::kDead ? nullptr : &branch;
}

// ---- PagePool --------------------------------------------------------------------------------------------

void PagePool::reserve(int64_t pages) {
    reserve_at_least(returned_, static_cast<size_t>(std::min(total_, fresh_ + pages)));
}

int32_t PagePool::take() {
    if (returned_.empty()) return static_cast<int32_t>(fresh_++);
    const int32_t page = returned_.back();
    returned_.pop_back();
    return page;
}

// ---- Runs ------------------------------------------------------------------------------------------------

// Reserves memory for `count` new runs, and for freeing every run.
void Forest::reserve_runs(int64_t count) {
    const auto needed = static_cast<size_t>(count);
    if (needed <= free_runs_.size()) return;
    const size_t runs = runs_.size() + needed - free_runs_.size();
    reserve_at_least(runs_, runs);
    reserve_at_least(free_runs_, runs);
}

// Needs reserved memory.
int32_t Forest::new_run(int32_t parent, int32_t first_column) noexcept {
    int32_t run = static_cast<int32_t>(runs_.size());
    if (free_runs_.empty()) {
        runs_.emplace_back();
    } else {
        run = free_runs_.back();
        free_runs_.pop_back();
        runs_[run] = Run{};
    }
    runs_[run].parent = parent;
    runs_[run].first_column = first_column;
    if (parent != kNone) add_child(parent, run);
    return run;
}

void Forest::add_child(int32_t parent, int32_t child) {
    Run& run = runs_[parent];
    ++run.refs;
    ++run.children;
    run.child_xor ^= child;
}

void Forest::remove_child(int32_t parent, int32_t child) {
    Run& run = runs_[parent];
    --run.refs;
    --run.children;
    run.child_xor ^= child;
}

// Removes a branch's reference to its run. Frees the run and those above it that have no more references.
void Forest::drop(int32_t run) noexcept {
    --runs_[run].refs;
    while (runs_[run].refs == 0) {
        const int32_t parent = runs_[run].parent;
        pool_.give_back(runs_[run].pages);
        runs_[run] = Run{};
        free_runs_.push_back(run);
        if (parent == kNone) return;
        remove_child(parent, run);
        run = parent;
    }
    if (runs_[run].refs == 1 && runs_[run].children == 1) join_with_child(run);
}

// A run whose only reference is its only child is joined with this child, as its front. The child's branches
// and children stay valid, and so does the room in its list, which an append may have reserved. If there is
// no memory for joining, the two stay separate, which only costs one more run.
void Forest::join_with_child(int32_t run) noexcept {
    const int32_t child = runs_[run].child_xor, parent = runs_[run].parent;
    try {
        reserve_at_least(runs_[run].pages, runs_[run].pages.size() + runs_[child].pages.capacity());
    } catch (const std::bad_alloc&) {
        return;
    }
    std::vector<int32_t> pages = std::move(runs_[run].pages);
    pages.insert(pages.end(), runs_[child].pages.begin(), runs_[child].pages.end());
    runs_[child].pages = std::move(pages);
    runs_[child].first_column = runs_[run].first_column;
    runs_[child].parent = parent;
    if (parent != kNone) {
        remove_child(parent, run);
        add_child(parent, child);
    }
    runs_[run] = Run{};
    free_runs_.push_back(run);
}

// Cuts a run after its first `count` pages. These become a new run above it, which is returned, so that
// nothing that points at the old run has to change. `rest` has room for the pages after the cut, and a new
// run is reserved.
int32_t Forest::split(int32_t run, size_t count, std::vector<int32_t> rest) noexcept {
    const int32_t parent = runs_[run].parent;
    rest.assign(runs_[run].pages.begin() + static_cast<ptrdiff_t>(count), runs_[run].pages.end());
    const int32_t upper = new_run(kNone, runs_[run].first_column);
    Run& above = runs_[upper];
    Run& below = runs_[run];
    above.pages = std::move(below.pages);
    above.pages.resize(count);
    below.pages = std::move(rest);
    above.parent = parent;
    below.parent = upper;
    below.first_column = end_column(above);
    if (parent != kNone) {
        remove_child(parent, run);
        add_child(parent, upper);
    }
    add_child(upper, run);
    return upper;
}

// ---- Branches --------------------------------------------------------------------------------------------

Branch& Forest::live(int64_t id, const char* name, int64_t i) {
    if (Branch* branch = branches_.find(id)) return *branch;
    const char* fate = branches_.was_issued(id) ? ", which was freed" : ", which never was one";
    throw std::out_of_range(entry(name, i) + ": expected a live branch, got " + std::to_string(id) + fate);
}

Branch& Forest::live_once(int64_t id, const char* name, int64_t i) {
    Branch& branch = live(id, name, i);
    if (branch.mark == operation_)
        bad_value(entry(name, i), "each branch once", std::to_string(id) + " again");
    branch.mark = operation_;
    return branch;
}

void Forest::check_live(std::span<const int64_t> branches, const char* name) const {
    for (size_t i = 0; i < branches.size(); ++i) live(branches[i], name, static_cast<int64_t>(i));
}

Forest::Forest(int64_t num_pages, int64_t page_size) : page_size_(page_size), pool_(num_pages) {
    if (num_pages < 1) bad_value("num_pages", "at least 1", std::to_string(num_pages));
    if (page_size < 1) bad_value("page_size", "at least 1", std::to_string(page_size));
    if (num_pages > kMaxSlots / page_size) {
        bad_value("num_pages", "num_pages * page_size below 2**31",
                  std::to_string(num_pages) + " pages of " + std::to_string(page_size));
    }
}

int64_t Forest::length(int64_t branch) const { return live(branch, "branch").length; }

int64_t Forest::add_root() {
    branches_.reserve(1);
    return branches_.add(Branch::kEmpty, 0);
}

std::vector<int64_t> Forest::fork(std::span<const int64_t> parents) {
    check_live(parents, "parents");
    std::vector<int64_t> children;
    children.reserve(parents.size());
    branches_.reserve(static_cast<int64_t>(parents.size()));
    for (const int64_t id : parents) {
        const Branch parent = *branches_.find(id);
        if (parent.run != Branch::kEmpty) ++runs_[parent.run].refs;
        logical_tokens_ += parent.length;
        children.push_back(branches_.add(parent.run, parent.length));
    }
    return children;
}

void Forest::free(std::span<const int64_t> branches) {
    ++operation_;
    for (size_t i = 0; i < branches.size(); ++i) live_once(branches[i], "branches", static_cast<int64_t>(i));
    for (const int64_t id : branches) {
        const Branch branch = *branches_.find(id);
        if (branch.run != Branch::kEmpty) drop(branch.run);
        logical_tokens_ -= branch.length;
        branches_.remove(id);
    }
}

// ---- Append ----------------------------------------------------------------------------------------------

// Checks an append and counts the memory that it needs, without changing anything.
Forest::Demand Forest::demand(std::span<const int64_t> branches, std::span<const int64_t> counts) {
    Demand total;
    ++operation_;
    for (size_t i = 0; i < branches.size(); ++i) {
        const Branch& branch = live_once(branches[i], "branches", static_cast<int64_t>(i));
        const int64_t count = counts[i];
        if (count < 0)
            bad_value(entry("counts", static_cast<int64_t>(i)), "at least 0", std::to_string(count));
        if (count == 0) continue;
        total.copies += copies_tail(branch);
        total.pages = saturating_add(total.pages, new_pages(branch, count));
        total.tokens = saturating_add(total.tokens, count);
    }
    total.pages = saturating_add(total.pages, total.copies);
    return total;
}

// Whether a branch must copy its last page before it writes to it. It must if the page is partly filled and
// another branch still uses it when the branch's turn comes: references count without those of earlier
// entries that will have left the run. To be called once for each entry that grows, in order, within one
// operation.
bool Forest::copies_tail(const Branch& branch) {
    if (branch.length % page_size_ == 0) return false;
    Run& run = runs_[branch.run];
    if (run.mark != operation_) {
        run.mark = operation_;
        run.scratch = 0;
    }
    const bool shared = run.refs - run.scratch > 1;
    run.scratch += shared;
    return shared;
}

// The number of pages that a branch needs for `count` more tokens, without the copy of its last page.
int64_t Forest::new_pages(const Branch& branch, int64_t count) const {
    const int64_t room = columns(branch.length) * page_size_ - branch.length;
    return count > room ? (count - room - 1) / page_size_ + 1 : 0;
}

// Reserves all memory of an append before anything is changed: for freed pages, for runs, and for their lists
// of pages. A branch that has a run alone gets room in its run. A branch that shares its run gets a new list,
// even if it will write in place as the last user, because its run then only has its last page.
std::vector<Forest::Spare> Forest::reserve(std::span<const int64_t> branches, std::span<const int64_t> counts,
                                           const Demand& total) {
    std::vector<Spare> spares;
    if (total.pages == 0) return spares;
    pool_.reserve(total.pages);
    int64_t runs = 0;
    ++operation_;
    for (size_t i = 0; i < branches.size(); ++i) {
        if (counts[i] == 0) continue;
        const Branch& branch = *branches_.find(branches[i]);
        const bool copies = copies_tail(branch);
        const auto pages = static_cast<size_t>(new_pages(branch, counts[i]));
        if (pages == 0 && !copies) continue;
        if (branch.run != Branch::kEmpty && runs_[branch.run].refs == 1) {
            reserve_at_least(runs_[branch.run].pages, runs_[branch.run].pages.size() + pages);
            continue;
        }
        Spare& spare = spares.emplace_back(i);
        spare.pages.reserve(pages + 1);  // one for its last page
        if (copies) spare.rest.reserve(1);
        runs += copies ? 2 : 1;
    }
    reserve_runs(runs);
    return spares;
}

// Moves a branch from its run to a new run, with one fresh page instead of the last one. Returns (the old
// page, the fresh one).
std::pair<int32_t, int32_t> Forest::copy_tail(Branch& branch, Spare& spare) noexcept {
    const int32_t shared = branch.run;
    const size_t pages = runs_[shared].pages.size();
    const int32_t source = runs_[shared].pages.back(), last_column = end_column(runs_[shared]) - 1;
    const int32_t above = pages > 1 ? split(shared, pages - 1, std::move(spare.rest)) : runs_[shared].parent;
    branch.run = new_run(above, last_column);
    runs_[branch.run].refs = 1;
    const int32_t copy = pool_.take();
    runs_[branch.run].pages = std::move(spare.pages);
    runs_[branch.run].pages.push_back(copy);
    drop(shared);
    return {source, copy};
}

// Adds pages for `count` > 0 more tokens to a branch that may write to its last page. `list` has room for
// them if the branch has no run of its own, or no room in it.
void Forest::grow(Branch& branch, int32_t count, std::vector<int32_t> list) noexcept {
    const int32_t old_columns = static_cast<int32_t>(columns(branch.length));
    const auto added = static_cast<size_t>(columns(branch.length + count) - old_columns);
    const bool in_place = branch.run != Branch::kEmpty && runs_[branch.run].refs == 1;
    if (!in_place) {
        const int32_t parent = branch.run;
        branch.run = new_run(parent == Branch::kEmpty ? kNone : parent, old_columns);
        runs_[branch.run].refs = 1;
        if (parent != Branch::kEmpty)
            --runs_[parent].refs;  // from a branch to a child run: never the last one
    }
    branch.length += count;
    logical_tokens_ += count;
    std::vector<int32_t>& pages = runs_[branch.run].pages;
    if (pages.capacity() < pages.size() + added) {
        list.assign(pages.begin(), pages.end());
        pages = std::move(list);
    }
    for (size_t n = 0; n < added; ++n) pages.push_back(pool_.take());
}

// Writes the slots of a branch's last `count` tokens. All of them are in its own run.
void Forest::write_slots(const Branch& branch, int32_t count, int32_t* slots) const {
    const Run& run = runs_[branch.run];
    const int32_t size = static_cast<int32_t>(page_size_);
    int32_t position = branch.length - count;
    while (count > 0) {
        const int32_t offset = position % size, n = std::min(size - offset, count);
        const int32_t first = run.pages[position / size - run.first_column] * size + offset;
        for (int32_t i = 0; i < n; ++i) *slots++ = first + i;
        position += n;
        count -= n;
    }
}

Append Forest::append(std::span<const int64_t> branches, std::span<const int64_t> counts) {
    if (branches.size() != counts.size()) {
        bad_value("counts", "one for each branch, " + std::to_string(branches.size()),
                  std::to_string(counts.size()));
    }
    const Demand total = demand(branches, counts);
    if (total.pages > pool_.available()) throw OutOfPages(total.pages, pool_.available());

    const auto tokens = static_cast<size_t>(total.tokens), copies = static_cast<size_t>(total.copies);
    Append result{IntBuffer(tokens), IntBuffer(copies), IntBuffer(copies)};
    std::vector<Spare> spares = reserve(branches, counts, total);
    auto spare = spares.begin();
    Spare none{};
    int32_t* slots = result.slots.data();
    size_t copied = 0;
    for (size_t i = 0; i < branches.size(); ++i) {
        const auto count = static_cast<int32_t>(counts[i]);
        if (count == 0) continue;
        Branch& branch = *branches_.find(branches[i]);
        Spare& memory = spare != spares.end() && spare->entry == i ? *spare++ : none;
        if (branch.length % page_size_ != 0 && runs_[branch.run].refs > 1) {
            std::tie(result.copy_src[copied], result.copy_dst[copied]) = copy_tail(branch, memory);
            ++copied;
        }
        grow(branch, count, std::move(memory.pages));
        write_slots(branch, count, slots);
        slots += count;
    }
    return result;
}

// ---- Truncate --------------------------------------------------------------------------------------------

void Forest::truncate(int64_t id, int64_t length) {
    Branch& branch = live(id, "branch");
    if (length < 0 || length > branch.length) {
        bad_value("length", "0 to " + std::to_string(branch.length) + ", the branch's length",
                  std::to_string(length));
    }
    // The run with the new last page is cut after it. The branch's own run is cut in place. Another run is
    // split, and its lower part is freed if nothing else refers to it.
    const auto end = static_cast<int32_t>(columns(length));
    const int32_t old = branch.run;
    int32_t run = old;
    while (run >= 0 && runs_[run].first_column >= end) run = runs_[run].parent;
    if (run >= 0 && end_column(runs_[run]) > end) {
        const auto kept = static_cast<size_t>(end - runs_[run].first_column);
        if (run == old && runs_[run].refs == 1) {
            pool_.give_back(std::span(runs_[run].pages).subspan(kept));
            runs_[run].pages.resize(kept);
        } else {
            reserve_runs(1);
            std::vector<int32_t> rest;
            rest.reserve(runs_[run].pages.size() - kept);
            run = split(run, kept, std::move(rest));
        }
    }
    logical_tokens_ -= branch.length - length;
    branch.length = static_cast<int32_t>(length);
    if (run == old) return;
    branch.run = run >= 0 ? run : Branch::kEmpty;
    if (run >= 0) ++runs_[run].refs;
    drop(old);
}

// ---- What the branches read ------------------------------------------------------------------------------

PageTable Forest::page_table(std::span<const int64_t> branches) const {
    PageTable table;
    table.lengths = IntBuffer(branches.size());
    for (size_t i = 0; i < branches.size(); ++i) {
        const int32_t length = live(branches[i], "branches", static_cast<int64_t>(i)).length;
        table.lengths[i] = length;
        table.width = std::max(table.width, columns(length));
    }
    table.pages = IntBuffer(branches.size() * static_cast<size_t>(table.width));
    int32_t* row = table.pages.data();
    for (const int64_t id : branches) {
        const Branch& branch = *branches_.find(id);
        std::fill(row + columns(branch.length), row + table.width, -1);
        for (int32_t run = branch.run; run >= 0; run = runs_[run].parent) {
            std::ranges::copy(runs_[run].pages, row + runs_[run].first_column);
        }
        row += table.width;
    }
    return table;
}

PlanTree Forest::plan_tree(std::span<const int64_t> branches) const {
    check_live(branches, "branches");
    PlanTree tree;
    tree.leaf.reserve(branches.size());
    tree.kv_lens.reserve(branches.size());
    ++operation_;
    for (const int64_t id : branches) {
        const Branch& branch = *branches_.find(id);
        tree.kv_lens.push_back(branch.length);
        tree.leaf.push_back(-1);
        // Walks up to a run that is already a node, and gives each run on the way the next index.
        int32_t below = -1;
        for (int32_t run = branch.run; run >= 0; run = runs_[run].parent) {
            Run& r = runs_[run];
            const bool known = r.mark == operation_;
            const int32_t node = known ? r.scratch : static_cast<int32_t>(tree.nodes.size());
            (below < 0 ? tree.leaf.back() : tree.nodes[below].parent) = node;
            if (known) break;
            r.mark = operation_;
            r.scratch = below = node;
            tree.nodes.push_back({.parent = -1, .first_column = r.first_column, .pages = r.pages});
        }
    }
    return tree;
}

ForestStats Forest::stats() const {
    // All pages of a run except its last are full. The last page is full if there are child runs; otherwise
    // it is read as far as the longest branch that ends in it.
    std::vector<int64_t> end(runs_.size(), 0);
    branches_.for_each([&](const Branch& branch) {
        if (branch.run >= 0) end[branch.run] = std::max<int64_t>(end[branch.run], branch.length);
    });
    int64_t unique = 0;
    for (size_t i = 0; i < runs_.size(); ++i) {
        const Run& run = runs_[i];
        if (run.refs == 0) continue;
        const int64_t tokens = run.children > 0 ? end_column(run) * page_size_ : end[i];
        unique += tokens - run.first_column * page_size_;
    }
    return {.branches = branches_.size(),
            .pages_total = pool_.total(),
            .pages_free = pool_.available(),
            .logical_tokens = logical_tokens_,
            .unique_tokens = unique};
}

}  // namespace tts
