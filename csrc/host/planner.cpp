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
        throw std::invalid_argument("q_lens: expected one for each branch, " + std::to_string(branches) +
                                    ", got " + std::to_string(given->size()));
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

int32_t block_floor(int64_t position) { return static_cast<int32_t>(position / kKeyBlock * kKeyBlock); }

// The tree's query rows in depth-first order, and the stretches of keys that ranges of rows read. Children
// and branches are in the order in which the branches were given.
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

    // Keys that the same rows read. Where branches fork, a stretch ends at the last whole block of keys that
    // they share, so that no block is read in two pieces.
    struct Stretch {
        int32_t row_begin, row_end;
        int32_t start, end;  // positions; start is a multiple of kKeyBlock
        int32_t parent;      // the stretch before it in its rows' branches, or -1
        int32_t node;        // in the tree: the lowest that has pages of it
        int32_t page_begin;  // in the plan's pages: that of `start`
        bool forks = false;  // its rows go on in other stretches
    };
    std::vector<Stretch> stretches;  // in preorder
    std::vector<int32_t> rows;       // -> packed row of q and out
    std::vector<int32_t> positions;  // of each row's token in its branch; -1 if the branch is empty
    std::vector<int32_t>
        shared;  // columns that a row's branch shares with the row before; kNever in one branch
    int64_t num_pages = 0;

    // Copies the stretches' pages, one after another.
    int32_t* copy_pages(int32_t* to) const {
        for (const Stretch& s : stretches) {
            const auto begin = static_cast<int32_t>(s.start / page_size_);
            const auto end = static_cast<int32_t>((s.end - 1) / page_size_ + 1);
            for (int32_t node = s.node, last = end; last > begin; node = tree_.nodes[node].parent) {
                const PlanTree::Node& source = tree_.nodes[node];
                const int32_t first = std::max(source.first_column, begin);
                std::copy_n(source.pages.begin() + (first - source.first_column), last - first,
                            to + (first - begin));
                last = first;
            }
            to += end - begin;
        }
        return to;
    }

  private:
    struct Links {
        int32_t first_child = -1, last_child = -1, next_sibling = -1;
        int32_t first_ended = -1, last_ended = -1;  // branches that end here, as a list linked by next_ended_
        int32_t own_stretch = -1;                   // the stretch of all its rows
        int32_t stretch = -1, reach = 0;            // the last stretch above its children, and where it ends
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
                leave(node);
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
        Links& own = links_[node];
        own.stretch = links_[parent(node)].stretch, own.reach = links_[parent(node)].reach;
        if (own.first_child >= 0) {
            // A single child continues alone: their common keys form one stretch, which belongs to the child.
            if (own.first_child == own.last_child && own.first_ended < 0) return;
            const int32_t fork = block_floor(end_column(node) * page_size_);
            if (fork > own.reach) {
                own.own_stretch = add_stretch(node, fork);
                own.stretch = own.own_stretch, own.reach = fork;
                stretches[own.stretch].forks = true;
            }
        }
        int32_t longest = 0, ended = 0;
        for (int32_t b = own.first_ended; b >= 0; b = next_ended_[b]) {
            longest = std::max(longest, tree_.kv_lens[b]);
            ended += q_lens_[b];
        }
        if (longest <= own.reach) return;
        const int32_t tail = add_stretch(node, longest);
        stretches[tail].row_end = stretches[tail].row_begin + ended;
    }

    void leave(int32_t node) {
        const int32_t own = links_[node].own_stretch;
        if (own >= 0) stretches[own].row_end = static_cast<int32_t>(rows.size());
    }

    // Begins where the stretch above ends. Its rows begin with the next row.
    int32_t add_stretch(int32_t node, int32_t end) {
        const int32_t start = links_[node].reach;
        stretches.push_back({.row_begin = static_cast<int32_t>(rows.size()),
                             .row_end = 0,
                             .start = start,
                             .end = end,
                             .parent = links_[node].stretch,
                             .node = node,
                             .page_begin = static_cast<int32_t>(num_pages)});
        num_pages += (end - 1) / page_size_ - start / page_size_ + 1;
        if (num_pages > kNever)
            throw std::invalid_argument("page_table: expected fewer than 2**31 pages in all");
        return static_cast<int32_t>(stretches.size()) - 1;
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

// ---- Parts, tasks, states
// ----------------------------------------------------------------------------------

class Schedule {
  public:
    Schedule(const RowOrder& order, const PlanShape& shape)
        : order_(order),
          rules_(shape.rules),
          page_size_(shape.page_size),
          window_(shape.window),
          group_(shape.num_q_heads / shape.num_kv_heads),
          heads_(shape.num_kv_heads) {
        list_parts();
        cut_tasks();
        join_parts();
        give_slots();
        emit_tasks();
        list_merges();
    }

    std::vector<Segment> segments;
    std::vector<Task> tasks;
    std::vector<int32_t> merge_indptr, merge_slots;
    int32_t num_slots = 0;

  private:
    // The keys of a stretch that some rows read within one chunk of positions. The parts of a row are in
    // ascending order of position.
    struct Part {
        int32_t page_begin, start, length, row_begin, row_end;
        int32_t before;       // the part before it in its rows' branches, or -1
        bool forks;           // as its stretch
        int32_t task = -1;    // in task_parts_
        int32_t root = -1;    // where the state that it belongs to begins; itself in most cases
        bool pieces = false;  // its chunk begins in another task: each block of keys is a state
        bool open = false;    // some row's chunk goes on in another task
        bool folds = false;   // its state joins the task's own
        int32_t slot = -1;    // of row_begin, unless it folds
    };
    struct TaskParts {
        std::vector<int32_t> parts;
        int64_t cost;  // of a work item
    };

    int32_t num_rows() const { return static_cast<int32_t>(order_.rows.size()); }
    bool narrow(const Part& p) const {
        return (p.row_end - p.row_begin) * group_ <= rules_.narrow_query_rows;
    }
    int64_t cost(const Part& p) const {
        return p.length * std::max((p.row_end - p.row_begin) * group_, rules_.min_query_rows) +
               rules_.segment_overhead;
    }
    int32_t end(const Part& p) const { return p.start + p.length; }

    // The end of the block of rows that starts at `begin`. The cut is where neighbours share the fewest
    // columns, among blocks of at least half the largest size.
    int32_t block_end(int32_t begin) const {
        const auto most = static_cast<int32_t>(std::max<int64_t>(1, rules_.max_query_rows / group_));
        if (num_rows() - begin <= most) return num_rows();
        int32_t best = begin + most;
        for (int32_t row = best - 1; row >= begin + (most + 1) / 2; --row) {
            if (order_.shared[row] < order_.shared[best]) best = row;
        }
        return best;
    }

    void list_parts() {
        last_part_.resize(order_.stretches.size());
        std::vector<int32_t> active;  // stretches that rows of the block read, in preorder
        int32_t next = 0;
        const auto count = static_cast<int32_t>(order_.stretches.size());
        for (int32_t begin = 0, end = 0; begin < num_rows(); begin = end) {
            end = block_end(begin);
            std::erase_if(active, [&](int32_t i) { return order_.stretches[i].row_end <= begin; });
            for (; next < count && order_.stretches[next].row_begin < end; ++next) active.push_back(next);
            for (const int32_t i : active) list_stretch(i, begin, end);
            block_ends_.push_back(parts_.size());
        }
    }

    // Lists the parts of a stretch that rows [begin, end) read.
    void list_stretch(int32_t index, int32_t begin, int32_t end) {
        const RowOrder::Stretch& s = order_.stretches[index];
        const int32_t row_begin = std::max(begin, s.row_begin), row_end = std::min(end, s.row_end);
        int32_t oldest = kNever, newest = -1;
        for (int32_t row = row_begin; row < row_end; ++row) {
            oldest = std::min(oldest, order_.positions[row]);
            newest = std::max(newest, order_.positions[row]);
        }
        const int64_t last = std::min(s.end, newest + 1);
        int32_t start = s.start, before = s.parent < 0 ? -1 : last_part_[s.parent];
        if (window_ > 0) start = std::max(start, block_floor(std::max<int64_t>(0, oldest + 1 - window_)));
        for (int32_t stop; start < last; start = stop) {
            stop = static_cast<int32_t>(std::min(last, (start / rules_.chunk + 1) * rules_.chunk));
            Part p{
                .page_begin = s.page_begin + static_cast<int32_t>(start / page_size_ - s.start / page_size_),
                .start = start,
                .length = stop - start,
                .row_begin = row_begin,
                .row_end = row_end,
                .before = before,
                .forks = s.forks};
            if (!trim(p)) continue;
            before = static_cast<int32_t>(parts_.size());
            parts_.push_back(p);
        }
        last_part_[index] = before;
    }

    // Removes rows at both ends that see none of a part's keys, then keys after those that the other rows
    // see; false if nothing is left. Rows whose window has passed the part stay if it ends within a chunk,
    // because their state may continue after it.
    bool trim(Part& p) const {
        const bool whole = end(p) % rules_.chunk == 0;
        const auto sees = [&](int32_t row) {
            const int64_t position = order_.positions[row];
            return position >= p.start && (window_ == 0 || !whole || position - window_ < end(p) - 1);
        };
        while (p.row_begin < p.row_end && !sees(p.row_begin)) ++p.row_begin;
        while (p.row_begin < p.row_end && !sees(p.row_end - 1)) --p.row_end;
        if (p.row_begin == p.row_end) return false;
        const auto rows = std::span(order_.positions).subspan(p.row_begin, p.row_end - p.row_begin);
        if (window_ > 0) p.length = std::min(p.length, std::ranges::max(rows) + 1 - p.start);
        return true;
    }

    void cut_tasks() {
        const auto add = [&](int64_t sum, const Part& p) { return sum + cost(p); };
        const int64_t total = std::accumulate(parts_.begin(), parts_.end(), int64_t{0}, add);
        const int64_t item_cost = std::max(total * heads_ / rules_.work_items, rules_.min_item_cost);
        size_t begin = 0;
        std::vector<int32_t> few, many;
        for (const size_t end : block_ends_) {
            few.clear(), many.clear();
            for (size_t i = begin; i < end; ++i) {
                (narrow(parts_[i]) ? few : many).push_back(static_cast<int32_t>(i));
            }
            // Stretches with forks are ordered by chunks, so that a chunk with several parts is less often
            // split between two tasks.
            std::ranges::stable_sort(many, {}, [&](int32_t i) {
                return parts_[i].forks ? parts_[i].start / rules_.chunk : int64_t{kNever};
            });
            cut_run(few, std::max<int64_t>(1, item_cost / heads_), heads_);
            cut_run(many, item_cost, 1);
            begin = end;
        }
        std::ranges::stable_sort(task_parts_, std::ranges::greater{}, &TaskParts::cost);
        for (size_t t = 0; t < task_parts_.size(); ++t) {
            for (const int32_t i : task_parts_[t].parts) parts_[i].task = static_cast<int32_t>(t);
        }
    }

    // Groups a run of parts into tasks with a cost of about `target`; a task is a work item for `heads`
    // heads. The share of a task is computed from the remaining cost when it begins.
    void cut_run(const std::vector<int32_t>& run, int64_t target, int64_t heads) {
        int64_t left = 0, spent = 0, share = 0;
        for (const int32_t i : run) left += cost(parts_[i]);
        for (const int32_t i : run) {
            const int64_t more = cost(parts_[i]), over = spent + more - share;
            if (spent == 0 || over > share - spent) {  // the task is nearer to its share without it
                share = left / std::max<int64_t>(1, (left + target / 2) / target);
                spent = 0;
                task_parts_.push_back({{}, 0});
            }
            task_parts_.back().parts.push_back(i);
            task_parts_.back().cost += more * heads;
            spent += more;
            left -= more;
        }
    }

    // Decides which parts continue the state of the part before them, and which states are merged into their
    // task's own.
    void join_parts() {
        for (int32_t i = 0; i < static_cast<int32_t>(parts_.size()); ++i) {
            Part& p = parts_[i];
            p.root = i;
            if (p.before < 0 || p.start % rules_.chunk == 0) continue;
            const Part& before = parts_[p.before];
            if (end(before) != p.start) continue;  // no row sees the keys between them
            if (before.task == p.task && !before.pieces) {
                p.root = before.root;
            } else {
                p.pieces = true;
                parts_[before.root].open = true;
            }
        }
        for (Part& p : parts_) {
            const Part& root = parts_[p.root];
            const Part* before = root.before < 0 ? nullptr : &parts_[root.before];
            p.folds = !root.pieces && !root.open && (!before || (before->folds && before->task == p.task));
        }
    }

    int32_t take_slots(int64_t count) {
        const int64_t slot = num_slots;
        if (slot + count > kNever)
            throw std::invalid_argument("q_lens: expected fewer than 2**31 partial states");
        num_slots = static_cast<int32_t>(slot + count);
        return static_cast<int32_t>(slot);
    }

    static int32_t num_states(const Part& p) {
        return p.pieces ? static_cast<int32_t>((p.length - 1) / kKeyBlock + 1) : 1;
    }

    void give_slots() {
        for (int32_t i = 0; i < static_cast<int32_t>(parts_.size()); ++i) {
            Part& p = parts_[i];
            if (p.folds) continue;
            const Part& root = parts_[p.root];
            p.slot = p.root == i ? take_slots(int64_t{p.row_end - p.row_begin} * num_states(p))
                                 : root.slot + p.row_begin - root.row_begin;
        }
    }

    void emit_tasks() {
        for (const TaskParts& from : task_parts_) {
            const auto at = static_cast<int32_t>(segments.size());
            Task task{.seg_begin = at, .seg_end = at, .row_begin = kNever, .row_end = 0, .slot = -1};
            for (const int32_t i : from.parts) {
                emit(parts_[i], parts_[i].root == i);
                task.row_begin = std::min(task.row_begin, parts_[i].row_begin);
                task.row_end = std::max(task.row_end, parts_[i].row_end);
            }
            task.seg_end = static_cast<int32_t>(segments.size());
            tasks.push_back(task);
        }
    }

    void emit(const Part& p, bool fresh) {
        for (int32_t i = 0; i < num_states(p); ++i) {
            const int32_t start = p.start + i * kKeyBlock;
            const auto [row_begin, row_end] = rows_of_state(p, i);
            segments.push_back(
                {.page_begin = p.page_begin + static_cast<int32_t>(start / page_size_ - p.start / page_size_),
                 .start = start,
                 .length = p.pieces ? std::min(kKeyBlock, end(p) - start) : p.length,
                 .row_begin = row_begin,
                 .row_end = row_end,
                 .slot = p.folds ? -1 : slot(p, i, row_begin),
                 .fresh = fresh});
        }
    }

    // The rows that see some key of a part's state, and rows between them; also the state's slot for a row.
    std::pair<int32_t, int32_t> rows_of_state(const Part& p, int32_t state) const {
        int32_t first = p.row_begin, last = p.row_end;
        const int32_t start = p.start + state * kKeyBlock;
        while (order_.positions[first] < start) ++first;
        while (order_.positions[last - 1] < start) --last;
        return {first, last};
    }
    static int32_t slot(const Part& p, int32_t state, int32_t row) {
        return p.slot + state * (p.row_end - p.row_begin) + row - p.row_begin;
    }

    // Lists for each row with states in slots: first the task's own state, if there is one, then the others
    // in ascending order of position.
    void list_merges() {
        struct Entry {
            int32_t row, value;
        };
        std::vector<Entry> entries;
        std::vector<int32_t> own(order_.rows.size(),
                                 -1);  // the task that a row begins in; -1 once it is listed
        for (const Part& p : parts_) {
            if (p.folds) {
                std::fill(own.begin() + p.row_begin, own.begin() + p.row_end, p.task);
                continue;
            }
            if (&p != &parts_[p.root]) continue;
            for (int32_t row = p.row_begin; row < p.row_end; ++row) {
                if (own[row] >= 0) entries.push_back({row, merge_entry(own_slot(own[row], row), false)});
                own[row] = -1;
            }
            for (int32_t i = 0; i < num_states(p); ++i) {
                const auto [first, last] = rows_of_state(p, i);
                for (int32_t row = first; row < last; ++row) {
                    entries.push_back({row, merge_entry(slot(p, i, row), p.pieces)});
                }
            }
        }
        merge_indptr.assign(order_.rows.size() + 1, 0);
        for (const Entry& entry : entries) ++merge_indptr[entry.row + 1];
        std::partial_sum(merge_indptr.begin(), merge_indptr.end(), merge_indptr.begin());
        merge_slots.resize(entries.size());
        std::vector<int32_t> at(merge_indptr.begin(), merge_indptr.end() - 1);
        for (const Entry& entry : entries) merge_slots[at[entry.row]++] = entry.value;
    }

    // The slot of a row's state that is the task's own.
    int32_t own_slot(int32_t index, int32_t row) {
        Task& task = tasks[index];
        if (task.slot < 0) task.slot = take_slots(task.row_end - task.row_begin);
        return task.slot + row - task.row_begin;
    }

    const RowOrder& order_;
    const PlanRules& rules_;
    const int64_t page_size_, window_, group_, heads_;
    std::vector<Part> parts_;            // block of rows by block, in preorder of the stretches
    std::vector<size_t> block_ends_;     // in parts_
    std::vector<int32_t> last_part_;     // of each stretch in the block of rows in hand, or what is before it
    std::vector<TaskParts> task_parts_;  // the tasks, dearest first
};

// ---- Buffers
// -----------------------------------------------------------------------------------------------

struct Plan {
    Plan(const PlanTree& tree, std::optional<std::span<const int64_t>> q_lens, const PlanShape& shape)
        : tree(tree),
          q_lens(check_q_lens(tree, q_lens)),
          order(tree, this->q_lens, shape.page_size),
          schedule(order, shape) {}

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
                static_cast<int64_t>(schedule.tasks.size()) * kTaskInts,
                static_cast<int64_t>(schedule.segments.size()) * kSegmentInts,
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
        int32_t* pages = order.copy_pages(out.field(PlanBuffer::kPages).data());
        std::fill(pages, std::to_address(out.field(PlanBuffer::kPages).end()), 0);
    }

    // Copies a list of int32, or of structs of int32, into a field, and clears the rest of the field.
    template <class List>
    static void put(PlanBuffer& out, PlanBuffer::Field field, const List& values) {
        const std::span<int32_t> to = out.field(field);
        const size_t size = values.size() * sizeof(values[0]) / sizeof(int32_t);
        if (size > 0) std::memcpy(to.data(), values.data(), size * sizeof(int32_t));
        std::fill(to.begin() + static_cast<ptrdiff_t>(size), to.end(), 0);
    }
};

// Spare room for a few hundred more tokens in each branch, and for a tree of another shape and similar size.
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
    const int64_t branches = static_cast<int64_t>(tree.leaf.size());
    const int64_t states = 8 * branches + 2 * std::min(room[PlanBuffer::kRows], 128 * branches);
    // A branch that copies its last page gets a stretch of its own. As branches grow, each may be read by two
    // tasks, and its last chunk may need a slot for each block of keys.
    const int64_t tasks = room[PlanBuffer::kTasks] / kTaskInts,
                  segments = room[PlanBuffer::kSegments] / kSegmentInts;
    room[PlanBuffer::kTasks] = kTaskInts * with_slack(tasks, tasks + 16);
    room[PlanBuffer::kSegments] = kSegmentInts * with_slack(segments, 8 * branches + tasks + 32);
    room[PlanBuffer::kMergeSlots] = with_slack(room[PlanBuffer::kMergeSlots], states);
    room[PlanBuffer::kPages] =
        with_slack(room[PlanBuffer::kPages], branches * (kSpareTokens / shape.page_size + 1));
    // A power of two: torch.compile treats it as a constant, so it should rarely change.
    PlanBuffer out(room, static_cast<int64_t>(std::bit_ceil(
                             static_cast<uint64_t>(with_slack(plan.schedule.num_slots, states)))));
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
    need("tasks", used[PlanBuffer::kTasks], room[PlanBuffer::kTasks], kTaskInts);
    need("segments", used[PlanBuffer::kSegments], room[PlanBuffer::kSegments], kSegmentInts);
    need("merge_slots", used[PlanBuffer::kMergeSlots], room[PlanBuffer::kMergeSlots], 1);
    need("pages", used[PlanBuffer::kPages], room[PlanBuffer::kPages], 1);
    need("partial slots", plan.schedule.num_slots, out.max_slots(), 1);
    plan.store(out);
}

}  // namespace tts
