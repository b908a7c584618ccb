#include "planner.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace tts {
namespace {

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

// ---- Rows in depth-first order
// -----------------------------------------------------------------------------

std::vector<int32_t> check_q_lens(const PlanTree& tree, std::optional<std::span<const int64_t>> given) {
    const size_t branches = tree.leaf.size();
    if (!given) return std::vector<int32_t>(branches, 1);
    if (given->size() != branches) {
        throw std::invalid_argument("q_lens: expected one a branch, " + std::to_string(branches) + ", got " +
                                    std::to_string(given->size()));
    }
    std::vector<int32_t> q_lens(branches);
    int64_t total = 0;
    for (size_t b = 0; b < branches; ++b) {
        const int64_t q_len = (*given)[b];
        if (q_len < 0 || q_len > tree.kv_lens[b]) {
            throw std::invalid_argument("q_lens[" + std::to_string(b) + "]: expected 0 to " +
                                        std::to_string(tree.kv_lens[b]) + ", the branch's length, got " +
                                        std::to_string(q_len));
        }
        q_lens[b] = static_cast<int32_t>(q_len);
        total += q_len;
    }
    if (total > kNever) throw std::invalid_argument("q_lens: expected fewer than 2**31 rows in all");
    return q_lens;
}

// The tree's nodes and query rows, depth first; children and branches in the order in which the branches were
// named.
class RowOrder {
  public:
    RowOrder(const PlanTree& tree, const std::vector<int32_t>& q_lens, int64_t page_size)
        : tree_(tree),
          q_lens_(q_lens),
          page_size_(page_size),
          root_(static_cast<int32_t>(tree.nodes.size())) {
        links_.resize(tree.nodes.size() + 1);
        next_ended_.resize(tree.leaf.size(), -1);
        q_starts_.resize(q_lens.size());
        std::exclusive_scan(q_lens.begin(), q_lens.end(), q_starts_.begin(), 0);
        link();
        walk();
    }

    struct Node {
        int32_t row_begin, row_end;  // of the branches that read it
        int32_t page_begin;          // in the plan's pages
        int32_t start, end;          // positions of its first token, and behind its last one that is read
        int32_t index;               // in the tree
    };
    std::vector<Node> nodes;         // those that some row reads, in preorder
    std::vector<int32_t> rows;       // -> packed row of q and out
    std::vector<int32_t> positions;  // of each row's token in its branch; -1 if the branch is empty
    std::vector<int32_t>
        shared;  // columns that a row's branch shares with the row before; kNever in one branch
    int64_t num_pages = 0;

  private:
    struct Links {
        int32_t first_child = -1, last_child = -1, next_sibling = -1;
        int32_t first_ended = -1, last_ended = -1;  // branches that end here, linked by next_ended_
        int32_t position = -1;                      // in `nodes`
        bool linked = false;
    };

    int32_t node_or_root(int32_t node) const { return node < 0 ? root_ : node; }
    int32_t parent(int32_t node) const { return node_or_root(tree_.nodes[node].parent); }
    int32_t end_column(int32_t node) const {
        if (node == root_) return 0;
        return tree_.nodes[node].first_column + static_cast<int32_t>(tree_.nodes[node].pages.size());
    }

    void link() {
        for (int32_t b = 0; b < static_cast<int32_t>(q_lens_.size()); ++b) {
            if (q_lens_[b] == 0) continue;
            int32_t node = node_or_root(tree_.leaf[b]);
            Links& leaf = links_[node];
            (leaf.last_ended < 0 ? leaf.first_ended : next_ended_[leaf.last_ended]) = b;
            leaf.last_ended = b;
            while (node != root_ && !links_[node].linked) {
                links_[node].linked = true;
                Links& above = links_[parent(node)];
                (above.last_child < 0 ? above.first_child : links_[above.last_child].next_sibling) = node;
                above.last_child = node;
                node = parent(node);
            }
        }
    }

    void walk() {
        int32_t node = root_, low = 0;  // low: the fewest columns of any node passed since the last row
        emit_rows(root_, low);
        for (;;) {
            int32_t next = links_[node].first_child;
            while (next < 0 && node != root_) {
                nodes[links_[node].position].row_end = static_cast<int32_t>(rows.size());
                next = links_[node].next_sibling;
                node = parent(node);
                low = std::min(low, end_column(node));
            }
            if (next < 0) return;
            node = next;
            enter(node);
            emit_rows(node, low);
        }
    }

    void enter(int32_t node) {
        const PlanTree::Node& source = tree_.nodes[node];
        // Those that go on below read all of it, else the longest branch that ends here says how far it is
        // read.
        int64_t end = links_[node].first_child < 0 ? 0 : end_column(node) * page_size_;
        for (int32_t b = links_[node].first_ended; b >= 0; b = next_ended_[b]) {
            end = std::max<int64_t>(end, tree_.kv_lens[b]);
        }
        links_[node].position = static_cast<int32_t>(nodes.size());
        nodes.push_back({.row_begin = static_cast<int32_t>(rows.size()),
                         .row_end = 0,
                         .page_begin = static_cast<int32_t>(num_pages),
                         .start = static_cast<int32_t>(source.first_column * page_size_),
                         .end = static_cast<int32_t>(end),
                         .index = node});
        num_pages += static_cast<int64_t>(source.pages.size());
        if (num_pages > kNever)
            throw std::invalid_argument("page_table: expected fewer than 2**31 pages in all");
    }

    void emit_rows(int32_t node, int32_t& low) {
        for (int32_t b = links_[node].first_ended; b >= 0; b = next_ended_[b]) {
            const int32_t first = tree_.kv_lens[b] - q_lens_[b];  // -1 for the row of an empty branch
            for (int32_t j = 0; j < q_lens_[b]; ++j) {
                rows.push_back(q_starts_[b] + j);
                positions.push_back(first + j);
                shared.push_back(j == 0 ? low : kNever);
            }
            low = end_column(node);
        }
    }

    const PlanTree& tree_;
    const std::vector<int32_t>& q_lens_;
    const int64_t page_size_;
    const int32_t root_;        // a virtual node above all roots; empty branches end in it
    std::vector<Links> links_;  // [tree nodes + 1]
    std::vector<int32_t> next_ended_, q_starts_;
};

// ---- Segments and tasks
// ------------------------------------------------------------------------------------

class Schedule {
  public:
    Schedule(const RowOrder& order, const PlanShape& shape, const PlanRules& rules)
        : order_(order),
          rules_(rules),
          page_size_(shape.page_size),
          group_(shape.num_q_heads / shape.num_kv_heads),
          heads_(shape.num_kv_heads) {
        list_segments();
        cut_tasks();
        list_merges();
    }

    std::vector<Segment> segments;
    std::vector<Task> tasks;
    std::vector<int32_t> merge_indptr, merge_slots;
    int32_t num_slots = 0;

  private:
    int32_t num_rows() const { return static_cast<int32_t>(order_.rows.size()); }
    bool narrow(const Segment& s) const {
        return (s.row_end - s.row_begin) * group_ <= rules_.narrow_query_rows;
    }
    int64_t cost_of_token(const Segment& s) const {
        return std::max((s.row_end - s.row_begin) * group_, rules_.min_query_rows);
    }
    int64_t cost(const Segment& s) const { return s.length * cost_of_token(s) + rules_.segment_overhead; }

    // The end of the block of rows that starts at `begin`: where the fewest columns are shared across the
    // cut, among blocks of at least half the greatest size.
    int32_t block_end(int32_t begin) const {
        const auto most = static_cast<int32_t>(std::max<int64_t>(1, rules_.max_query_rows / group_));
        if (num_rows() - begin <= most) return num_rows();
        int32_t best = begin + most;
        for (int32_t row = best - 1; row >= begin + (most + 1) / 2; --row) {
            if (order_.shared[row] < order_.shared[best]) best = row;
        }
        return best;
    }

    void list_segments() {
        std::vector<const RowOrder::Node*> active;  // nodes that rows of the block read, in preorder
        auto next = order_.nodes.begin();
        for (int32_t begin = 0, end = 0; begin < num_rows(); begin = end) {
            end = block_end(begin);
            std::erase_if(active, [&](const RowOrder::Node* node) { return node->row_end <= begin; });
            for (; next != order_.nodes.end() && next->row_begin < end; ++next) active.push_back(&*next);
            list_block(active, begin, end);
        }
    }

    void list_block(const std::vector<const RowOrder::Node*>& active, int32_t begin, int32_t end) {
        const size_t first = uncut_.size();
        for (const RowOrder::Node* node : active) {
            const int32_t row_begin = std::max(begin, node->row_begin),
                          row_end = std::min(end, node->row_end);
            if (uncut_.size() > first && continues(uncut_.back(), *node, row_begin, row_end)) {
                uncut_.back().length = node->end - uncut_.back().start;
            } else {
                uncut_.push_back({.page_begin = node->page_begin,
                                  .start = node->start,
                                  .length = node->end - node->start,
                                  .row_begin = row_begin,
                                  .row_end = row_end});
            }
        }
        const auto unread = [&](Segment& s) { return !clip(s); };
        const auto begin_it = uncut_.begin() + static_cast<ptrdiff_t>(first);
        uncut_.erase(std::remove_if(begin_it, uncut_.end(), unread), uncut_.end());
        const auto wide =
            std::stable_partition(begin_it, uncut_.end(), [&](const Segment& s) { return narrow(s); });
        runs_.push_back({static_cast<size_t>(wide - uncut_.begin()), true});
        runs_.push_back({uncut_.size(), false});
    }

    // Whether a node's tokens follow those of a segment, in position and in the list of pages, for the same
    // rows.
    bool continues(const Segment& s, const RowOrder::Node& node, int32_t row_begin, int32_t row_end) const {
        return s.row_begin == row_begin && s.row_end == row_end && s.start + s.length == node.start &&
               s.page_begin + s.length / page_size_ == node.page_begin;
    }

    // Takes off the keys behind every row, then the rows at both ends that are before every key. False if
    // none is left.
    bool clip(Segment& s) const {
        const int32_t last = s.start + s.length - 1;
        int32_t newest = -1;
        for (int32_t row = s.row_end - 1; row >= s.row_begin && newest < last; --row) {
            newest = std::max(newest, order_.positions[row]);
        }
        s.length = std::min(last, newest) + 1 - s.start;
        if (s.length <= 0) return false;
        trim_rows(s);
        return true;
    }

    void trim_rows(Segment& s) const {
        while (order_.positions[s.row_begin] < s.start) ++s.row_begin;
        while (order_.positions[s.row_end - 1] < s.start) --s.row_end;
    }

    void cut_tasks() {
        const auto add = [&](int64_t sum, const Segment& s) { return sum + cost(s); };
        const int64_t total = std::accumulate(uncut_.begin(), uncut_.end(), int64_t{0}, add);
        const int64_t item_cost = std::max(total * heads_ / rules_.work_items, rules_.min_item_cost);
        size_t begin = 0;
        for (const auto& [end, narrow] : runs_) {
            const std::span<const Segment> run(uncut_.data() + begin, end - begin);
            const int64_t target = std::max<int64_t>(1, narrow ? item_cost / heads_ : item_cost);
            cut_run(run, std::accumulate(run.begin(), run.end(), int64_t{0}, add), target);
            begin = end;
        }
    }

    // Gathers a run of segments, of cost `left` in all, into tasks of about the cost `target`. A task's
    // share is worked out from what is left when it is opened.
    void cut_run(std::span<const Segment> run, int64_t left, int64_t target) {
        int64_t tasks_left, share, spent;
        const auto open = [&] {
            tasks_left = std::max<int64_t>(1, (left + target / 2) / target);
            share = left / tasks_left;
            spent = 0;
        };
        open();
        for (Segment rest : run) {
            while (rest.length > 0) {
                const int32_t tokens = tasks_left > 1 ? chunk(rest, share - spent) : rest.length;
                const Segment piece = front(rest, tokens);
                const int64_t over = spent + cost(piece) - share;
                const bool too_much =
                    spent > 0 && over > share - spent;  // without it, it is nearer to its share
                if (tasks_left > 1 && too_much) {
                    close_task();
                    open();
                    continue;
                }
                emit(piece);
                drop_front(rest, tokens);
                spent += cost(piece);
                left += (rest.length > 0 ? rules_.segment_overhead : 0) - cost(piece);
                if (tasks_left > 1 && over >= 0) {
                    close_task();
                    open();
                }
            }
        }
        close_task();
    }

    // How many tokens of a segment to take for about the given cost: all, or whole pages that leave no part
    // too short.
    int32_t chunk(const Segment& s, int64_t budget) const {
        if (cost(s) <= budget) return s.length;
        const int64_t affordable = (budget - rules_.segment_overhead) / cost_of_token(s);
        const int64_t tokens = std::max(affordable, rules_.min_chunk);
        const int64_t pages = std::max<int64_t>(tokens / page_size_, (rules_.min_chunk - 1) / page_size_ + 1);
        return s.length - pages * page_size_ >= rules_.min_chunk ? static_cast<int32_t>(pages * page_size_)
                                                                 : s.length;
    }

    Segment front(Segment s, int32_t tokens) const {
        s.length = tokens;
        return s;
    }

    void drop_front(Segment& s, int32_t tokens) const {
        s.page_begin += static_cast<int32_t>(tokens / page_size_);  // of no meaning where nothing is left
        s.start += tokens;
        s.length -= tokens;
    }

    void emit(Segment s) {
        trim_rows(s);  // a chunk may start behind rows that read the segment's first keys
        if (!open_) {
            const auto at = static_cast<int32_t>(segments.size());
            tasks.push_back({at, at, s.row_begin, s.row_end, num_slots});
            open_ = true;
        }
        segments.push_back(s);
        Task& task = tasks.back();
        task.seg_end = static_cast<int32_t>(segments.size());
        task.row_begin = std::min(task.row_begin, s.row_begin);
        task.row_end = std::max(task.row_end, s.row_end);
    }

    void close_task() {
        if (open_) num_slots += tasks.back().row_end - tasks.back().row_begin;
        open_ = false;
    }

    // For each row the slots of the tasks that read it, in the order of the tasks.
    void list_merges() {
        struct Entry {
            int32_t row, slot;
        };
        std::vector<Entry> entries;
        entries.reserve(static_cast<size_t>(num_slots));
        merge_indptr.assign(order_.rows.size() + 1, 0);
        std::vector<int32_t> change;  // in the number of segments that read a row, from row to row
        for (const Task& task : tasks) {
            change.assign(static_cast<size_t>(task.row_end - task.row_begin + 1), 0);
            for (int32_t i = task.seg_begin; i < task.seg_end; ++i) {
                ++change[segments[i].row_begin - task.row_begin];
                --change[segments[i].row_end - task.row_begin];
            }
            for (int32_t row = task.row_begin, reading = 0; row < task.row_end; ++row) {
                reading += change[row - task.row_begin];
                if (reading == 0) continue;
                entries.push_back({row, task.slot + row - task.row_begin});
                ++merge_indptr[row + 1];
            }
        }
        std::partial_sum(merge_indptr.begin(), merge_indptr.end(), merge_indptr.begin());
        merge_slots.resize(entries.size());
        std::vector<int32_t> at(merge_indptr.begin(), merge_indptr.end() - 1);
        for (const Entry& entry : entries) merge_slots[at[entry.row]++] = entry.slot;
    }

    const RowOrder& order_;
    const PlanRules& rules_;
    const int64_t page_size_, group_, heads_;
    std::vector<Segment> uncut_;  // of all blocks
    struct Run {
        size_t end;  // in uncut_
        bool narrow;
    };
    std::vector<Run> runs_;  // a block's narrow segments, then its wide ones
    bool open_ = false;      // whether the last task may take more segments
};

// ---- Buffers
// -----------------------------------------------------------------------------------------------

struct Plan {
    Plan(const PlanTree& tree, std::optional<std::span<const int64_t>> q_lens, const PlanShape& shape)
        : tree(tree),
          q_lens(check_q_lens(tree, q_lens)),
          order(tree, this->q_lens, shape.page_size),
          schedule(order, shape, shape.rules) {}

    const PlanTree& tree;
    const std::vector<int32_t> q_lens;
    const RowOrder order;
    const Schedule schedule;

    PlanBuffer::Lengths used() const {
        const auto rows = static_cast<int64_t>(order.rows.size());
        return {kPlanSizes,
                rows,
                rows,
                rows + 1,
                static_cast<int64_t>(schedule.tasks.size()) * kPlanRecord,
                static_cast<int64_t>(schedule.segments.size()) * kPlanRecord,
                static_cast<int64_t>(schedule.merge_slots.size()),
                order.num_pages};
    }

    void store(PlanBuffer& out) const {
        const std::array sizes = {PlanSizes{.segments = static_cast<int32_t>(schedule.segments.size()),
                                            .tasks = static_cast<int32_t>(schedule.tasks.size()),
                                            .slots = schedule.num_slots,
                                            .pages = static_cast<int32_t>(order.num_pages)}};
        put(out, PlanBuffer::kSizes, sizes);
        put(out, PlanBuffer::kRows, order.rows);
        put(out, PlanBuffer::kPositions, order.positions);
        put(out, PlanBuffer::kMergeIndptr, schedule.merge_indptr);
        put(out, PlanBuffer::kTasks, schedule.tasks);
        put(out, PlanBuffer::kSegments, schedule.segments);
        put(out, PlanBuffer::kMergeSlots, schedule.merge_slots);
        int32_t* pages = out.field(PlanBuffer::kPages).data();
        for (const RowOrder::Node& node : order.nodes) {
            pages = std::ranges::copy(tree.nodes[node.index].pages, pages).out;
        }
        std::fill(pages, std::to_address(out.field(PlanBuffer::kPages).end()), 0);
    }

    // Copies a list of int32 or of structs of int32 into a field, and clears the rest of it.
    template <class List>
    static void put(PlanBuffer& out, PlanBuffer::Field field, const List& values) {
        const std::span<int32_t> to = out.field(field);
        const size_t size = values.size() * sizeof(values[0]) / sizeof(int32_t);
        if (size > 0) std::memcpy(to.data(), values.data(), size * sizeof(int32_t));
        std::fill(to.begin() + static_cast<ptrdiff_t>(size), to.end(), 0);
    }
};

// Room for some hundreds of tokens more in every branch, and for another shape of the tree that is about as
// large.
constexpr int64_t kSpareTokens = 512;

int64_t with_slack(int64_t used, int64_t spare) { return used + used / 4 + spare; }

}  // namespace

PlanBuffer::PlanBuffer(const Lengths& lengths, int64_t max_slots) : lengths_(lengths), max_slots_(max_slots) {
    std::exclusive_scan(lengths_.begin(), lengths_.end(), begins_.begin(), int64_t{0});
    data_ = IntBuffer(static_cast<size_t>(begins_.back() + lengths_.back()));
}

PlanBuffer plan_attention(const PlanTree& tree, std::optional<std::span<const int64_t>> q_lens,
                          const PlanShape& shape) {
    const Plan plan(tree, q_lens, shape);
    PlanBuffer::Lengths room = plan.used();
    const int64_t rows = room[PlanBuffer::kRows], branches = static_cast<int64_t>(tree.leaf.size());
    // A branch that copies its last page gets a node of its own, and every task that reads it a segment more.
    const int64_t tasks = room[PlanBuffer::kTasks] / kPlanRecord,
                  segments = room[PlanBuffer::kSegments] / kPlanRecord;
    room[PlanBuffer::kTasks] = kPlanRecord * with_slack(tasks, tasks + 16);
    room[PlanBuffer::kSegments] = kPlanRecord * with_slack(segments, branches + tasks + 32);
    room[PlanBuffer::kMergeSlots] = with_slack(room[PlanBuffer::kMergeSlots], rows);
    room[PlanBuffer::kPages] =
        with_slack(room[PlanBuffer::kPages], branches * (kSpareTokens / shape.page_size + 1));
    // A power of two: torch.compile takes it for a constant, so it should seldom change.
    PlanBuffer out(room, static_cast<int64_t>(std::bit_ceil(
                             static_cast<uint64_t>(with_slack(plan.schedule.num_slots, rows)))));
    plan.store(out);
    return out;
}

void refill_plan(const PlanTree& tree, std::optional<std::span<const int64_t>> q_lens, const PlanShape& shape,
                 PlanBuffer& out) {
    const Plan plan(tree, q_lens, shape);
    const PlanBuffer::Lengths used = plan.used();
    if (used[PlanBuffer::kRows] != out.num_rows()) {
        throw std::invalid_argument("out: expected a plan of " + std::to_string(used[PlanBuffer::kRows]) +
                                    " rows, got one of " + std::to_string(out.num_rows()));
    }
    const auto need = [](const char* what, int64_t used, int64_t room, int64_t width) {
        if (used <= room) return;
        throw std::invalid_argument("out: expected room for " + std::to_string(used / width) + " " + what +
                                    ", got " + std::to_string(room / width));
    };
    const PlanBuffer::Lengths& room = out.lengths();
    need("tasks", used[PlanBuffer::kTasks], room[PlanBuffer::kTasks], kPlanRecord);
    need("segments", used[PlanBuffer::kSegments], room[PlanBuffer::kSegments], kPlanRecord);
    need("merge_slots", used[PlanBuffer::kMergeSlots], room[PlanBuffer::kMergeSlots], 1);
    need("pages", used[PlanBuffer::kPages], room[PlanBuffer::kPages], 1);
    need("partial slots", plan.schedule.num_slots, out.max_slots(), 1);
    plan.store(out);
}

}  // namespace tts
