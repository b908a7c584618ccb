// Plans against brute force: each row reads each of its keys exactly once, and what the kernels rely on
// holds.
#include <algorithm>
#include <map>
#include <random>
#include <span>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "forest.h"
#include "planner.h"

namespace {

using tts::Forest;
using tts::PlanBuffer;
using tts::PlanShape;
using tts::PlanTree;
using Ints = std::vector<int64_t>;
using QLens = std::optional<std::span<const int64_t>>;

// A plan's fields, and the checks that need no knowledge of what was planned.
class View {
  public:
    View(PlanBuffer& plan, const PlanShape& shape)
        : rows(plan.field(PlanBuffer::kRows)),
          positions(plan.field(PlanBuffer::kPositions)),
          indptr(plan.field(PlanBuffer::kMergeIndptr)),
          merge_slots(plan.field(PlanBuffer::kMergeSlots)),
          pages(plan.field(PlanBuffer::kPages)) {
        const auto sizes = plan.field(PlanBuffer::kSizes);
        segments = records<tts::Segment>(plan.field(PlanBuffer::kSegments), sizes[0]);
        tasks = records<tts::Task>(plan.field(PlanBuffer::kTasks), sizes[1]);
        num_slots = sizes[2];
        CHECK(static_cast<int64_t>(num_slots) <= plan.max_slots());
        CHECK(sizes[3] <= static_cast<int32_t>(pages.size()));
        check_tasks(shape.rules.max_query_rows / (shape.num_q_heads / shape.num_kv_heads));
        check_segments(shape.page_size, sizes[3]);
        check_merges();
    }

    std::span<const int32_t> rows, positions, indptr, merge_slots, pages;
    std::span<const tts::Segment> segments;
    std::span<const tts::Task> tasks;
    int32_t num_slots;

    // times[row][position]: how often a packed row reads a key; each key must be in `slot_of(row, position)`.
    template <class SlotOf>
    void check_reads(int64_t page_size, SlotOf slot_of) const {
        std::vector<std::vector<int>> times(rows.size());
        for (size_t r = 0; r < rows.size(); ++r) times[r].resize(static_cast<size_t>(positions[r] + 1), 0);
        for (const tts::Segment& s : segments) {
            for (int32_t r = s.row_begin; r < s.row_end; ++r) {
                for (int32_t at = s.start; at < s.start + s.length && at <= positions[r]; ++at) {
                    const int64_t page = pages[s.page_begin + at / page_size - s.start / page_size];
                    CHECK(page * page_size + at % page_size == slot_of(rows[r], at));
                    ++times[r][at];
                }
            }
        }
        for (const auto& row : times) CHECK(std::ranges::count(row, 1) == static_cast<int64_t>(row.size()));
    }

  private:
    template <class Record>
    static std::span<const Record> records(std::span<const int32_t> field, int32_t count) {
        CHECK(count * sizeof(Record) <= field.size() * sizeof(int32_t));
        return {reinterpret_cast<const Record*>(field.data()), static_cast<size_t>(count)};
    }

    void check_tasks(int64_t most_rows) const {
        int32_t seg = 0;
        for (const tts::Task& t : tasks) {
            CHECK(t.seg_begin == seg && t.seg_end > seg);
            CHECK(t.row_begin < t.row_end && t.row_end - t.row_begin <= std::max<int64_t>(1, most_rows));
            int32_t low = INT32_MAX, high = 0;
            for (int32_t i = t.seg_begin; i < t.seg_end; ++i) {
                low = std::min(low, segments[i].row_begin);
                high = std::max(high, segments[i].row_end);
            }
            CHECK(low == t.row_begin && high == t.row_end);
            CHECK(t.slot == -1 || is_slot(t.slot, t.row_end - t.row_begin));
            seg = t.seg_end;
        }
        CHECK(seg == static_cast<int32_t>(segments.size()));
    }

    bool is_slot(int32_t slot, int32_t count) const { return slot >= 0 && slot + count <= num_slots; }

    void check_segments(int64_t page_size, int32_t num_pages) const {
        for (const tts::Segment& s : segments) {
            CHECK(s.length > 0 && s.row_begin < s.row_end && s.start % tts::kKeyBlock == 0);
            CHECK(s.page_begin >= 0 &&
                  s.page_begin + (s.start % page_size + s.length - 1) / page_size < num_pages);
            CHECK(s.slot == -1 || is_slot(s.slot, s.row_end - s.row_begin));
            const auto reading = positions.subspan(s.row_begin, s.row_end - s.row_begin);
            CHECK(std::ranges::max(reading) >= s.start + s.length - 1);
            CHECK(reading.front() >= s.start && reading.back() >= s.start);
        }
    }

    // Every state in a slot is merged once; a row has some if more than one task reads it, and none without
    // keys.
    void check_merges() const {
        std::vector<int> readers(rows.size(), 0), used(static_cast<size_t>(num_slots), 0);
        for (const tts::Task& t : tasks) {
            for (int32_t r = t.row_begin; r < t.row_end; ++r) {
                const auto own = segments.subspan(t.seg_begin, t.seg_end - t.seg_begin);
                readers[r] += std::ranges::any_of(
                    own, [&](const tts::Segment& s) { return s.row_begin <= r && r < s.row_end; });
            }
        }
        CHECK(indptr.size() == rows.size() + 1 && indptr[0] == 0);
        for (size_t r = 0; r < rows.size(); ++r) {
            const auto entries = merge_slots.subspan(indptr[r], indptr[r + 1] - indptr[r]);
            CHECK(readers[r] < 2 || entries.size() > 1);
            CHECK((readers[r] == 0) == (positions[r] < 0) && (readers[r] > 0 || entries.empty()));
            for (const int32_t entry : entries) CHECK(used[tts::slot_of(entry)]++ == 0);
        }
        for (const tts::Segment& s : segments) {
            for (int32_t i = 0; s.slot >= 0 && i < s.row_end - s.row_begin; ++i) CHECK(used[s.slot + i] == 1);
        }
    }
};

// Every branch of a random forest, and the packed rows that it owns.
struct Case {
    Forest forest;
    Ints branches, q_lens;
    std::vector<std::pair<size_t, int32_t>> owner;  // packed row -> (index of its branch, position)
};

Case random_case(std::mt19937& random) {
    const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
    const int64_t page_sizes[] = {1, 3, 16, 64};
    Case c{.forest = Forest(1 << 17, page_sizes[below(4)]), .branches = {}, .q_lens = {}, .owner = {}};
    Ints all;
    for (int64_t step = 0, steps = 1 + below(60); step < steps; ++step) {
        if (all.empty() || below(8) == 0) all.push_back(c.forest.add_root());
        const int64_t parent = all[below(static_cast<int64_t>(all.size()))];
        for (const int64_t child : c.forest.fork(Ints(below(6), parent))) {
            c.forest.append(Ints{child}, Ints{below(8) == 0 ? below(1500) : below(40)});
            all.push_back(child);
        }
        const int64_t cut = all[below(static_cast<int64_t>(all.size()))];
        if (below(4) == 0) c.forest.truncate(cut, below(c.forest.length(cut) + 1));
    }
    for (int64_t i = 0, n = below(2 * static_cast<int64_t>(all.size())); i < n; ++i) {
        const int64_t branch = all[below(static_cast<int64_t>(all.size()))];
        const int64_t length = c.forest.length(branch);
        c.branches.push_back(branch);
        c.q_lens.push_back(std::min(length, below(8) == 0 ? below(200) : below(3)));
    }
    return c;
}

void own_rows(Case& c, bool use_q_lens) {
    for (size_t b = 0; b < c.branches.size(); ++b) {
        const auto length = static_cast<int32_t>(c.forest.length(c.branches[b]));
        const auto q_len = use_q_lens ? static_cast<int32_t>(c.q_lens[b]) : 1;
        for (int32_t j = 0; j < q_len; ++j) c.owner.emplace_back(b, length - q_len + j);
    }
}

void check_plan(PlanBuffer& plan, const Case& c, const PlanShape& shape) {
    const View view(plan, shape);
    CHECK(view.rows.size() == c.owner.size());
    std::vector<bool> seen(c.owner.size(), false);
    for (size_t r = 0; r < view.rows.size(); ++r) {
        CHECK(!seen[view.rows[r]]);
        seen[view.rows[r]] = true;
        CHECK(view.positions[r] == c.owner[view.rows[r]].second);
    }
    const tts::PageTable table = c.forest.page_table(c.branches);
    view.check_reads(shape.page_size, [&](int32_t row, int32_t position) {
        const int64_t at =
            static_cast<int64_t>(c.owner[row].first) * table.width + position / shape.page_size;
        return table.pages[at] * shape.page_size + position % shape.page_size;
    });
}

// Two buffers hold the same plan, and zeros behind what is used.
void check_equal(PlanBuffer& a, PlanBuffer& b) {
    for (int f = 0; f < PlanBuffer::kNumFields; ++f) {
        auto longer = a.field(static_cast<PlanBuffer::Field>(f)),
             shorter = b.field(static_cast<PlanBuffer::Field>(f));
        if (longer.size() < shorter.size()) std::swap(longer, shorter);
        CHECK(std::ranges::equal(longer.first(shorter.size()), shorter));
        CHECK(std::ranges::count(longer.subspan(shorter.size()), 0) ==
              static_cast<int64_t>(longer.size() - shorter.size()));
    }
}

void plans_read_every_key_once(uint32_t seed) {
    std::mt19937 random(seed);
    Case c = random_case(random);
    const bool use_q_lens = seed % 3 != 0;
    own_rows(c, use_q_lens);
    const int64_t kv_heads = 1 + random() % 4, group = seed % 7 == 0 ? 600 : 1 + random() % 16;
    const PlanShape shape{c.forest.page_size(), kv_heads * group, kv_heads,
                          seed % 4 == 0 ? tts::kGpuRules : tts::PlanRules{}};
    const QLens q_lens = use_q_lens ? QLens(c.q_lens) : std::nullopt;

    PlanBuffer plan = tts::plan_attention(c.forest.plan_tree(c.branches), q_lens, shape);
    check_plan(plan, c, shape);

    // The same from the page table alone, with rubbish behind every length.
    const tts::PageTable table = c.forest.page_table(c.branches);
    Ints wide, kv_lens(table.lengths.data(), table.lengths.data() + table.lengths.size());
    for (size_t b = 0; b < c.branches.size(); ++b) {
        for (int64_t column = 0; column < table.width; ++column) {
            wide.push_back(column * shape.page_size < kv_lens[b] ? table.pages[b * table.width + column]
                                                                 : -7);
        }
        wide.push_back(INT64_MAX);
    }
    const tts::PageTableView foreign{
        wide.data(), 8, table.width + 1, 1, static_cast<int64_t>(kv_lens.size()), table.width + 1};
    const PlanTree tree = tts::shared_prefixes(foreign, kv_lens, shape.page_size);
    PlanBuffer again = tts::plan_attention(tree, q_lens, shape);
    check_equal(again, plan);
    tts::refill_plan(c.forest.plan_tree(c.branches), q_lens, shape, again);
    check_equal(again, plan);
}

// 256 branches on a trunk, with some tokens of their own.
struct Star {
    Forest forest{1 << 15, 16};
    Ints branches;
    explicit Star(int64_t trunk = 1000, int64_t own = 30) {
        const int64_t root = forest.add_root();
        forest.append(Ints{root}, Ints{trunk});
        branches = forest.fork(Ints(256, root));
        forest.free(Ints{root});
        forest.append(branches, Ints(256, own));
    }
};

void a_trunk_is_read_once_a_block_of_rows() {
    Star star;
    const PlanShape shape{16, 32, 8};
    PlanBuffer plan = tts::plan_attention(star.forest.plan_tree(star.branches), std::nullopt, shape);
    const View view(plan, shape);
    std::map<int32_t, int64_t> trunk_tokens;  // by the first row of its readers
    for (const tts::Segment& s : view.segments) {
        if (s.row_end - s.row_begin > 1) trunk_tokens[s.row_begin] += s.length;
    }
    // 15 blocks of 64 keys; what is behind them belongs to each branch. 512 / 4 rows per block.
    CHECK((trunk_tokens == std::map<int32_t, int64_t>{{0, 960}, {128, 960}}));
}

// 32 rows of 4 query heads a task, which is a tile; many tasks, none of which reads less than it should.
void a_gpu_gets_many_small_tasks() {
    Star star(4000, 60);
    const PlanShape shape{16, 32, 8, tts::kGpuRules};
    PlanBuffer plan = tts::plan_attention(star.forest.plan_tree(star.branches), std::nullopt, shape);
    const View view(plan, shape);
    CHECK(view.tasks.size() >= 96 && view.tasks.size() <= 192);
    for (const tts::Task& task : view.tasks) {
        CHECK(task.row_end - task.row_begin <= 32);
        int64_t tokens = 0;
        for (int32_t i = task.seg_begin; i < task.seg_end; ++i) tokens += view.segments[i].length;
        CHECK(tokens >= 128);
    }
}

void blocks_end_where_trees_end() {
    Forest forest(1 << 12, 16);
    Ints branches;
    for (int tree = 0; tree < 5; ++tree) {  // 5 trees of 60 rows, 128 rows per block
        const int64_t root = forest.add_root();
        forest.append(Ints{root}, Ints{640});
        const Ints children = forest.fork(Ints(60, root));
        branches.insert(branches.end(), children.begin(), children.end());
    }
    const PlanShape shape{16, 32, 8};
    PlanBuffer plan = tts::plan_attention(forest.plan_tree(branches), std::nullopt, shape);
    int64_t read = 0;
    for (const tts::Segment& s : View(plan, shape).segments) read += s.length;
    CHECK(read == 5 * 640);
}

// Of each work item: a task for one head, or for all heads where its segments are narrow.
std::vector<int64_t> item_costs(const View& view, int64_t group, int64_t kv_heads) {
    std::vector<int64_t> costs;
    for (const tts::Task& t : view.tasks) {
        int64_t cost = 0;
        bool narrow = true;
        for (const tts::Segment& s : view.segments.subspan(t.seg_begin, t.seg_end - t.seg_begin)) {
            cost += s.length * std::max<int64_t>(group * (s.row_end - s.row_begin), 24) + 1024;
            narrow &= group * (s.row_end - s.row_begin) <= 8;
        }
        costs.insert(costs.end(), narrow ? 1 : kv_heads, narrow ? cost * kv_heads : cost);
    }
    return costs;
}

void work_items_are_of_about_equal_cost() {
    for (const int64_t kv_heads : {1, 2, 8, 64}) {
        const PlanShape shape{16, 4 * kv_heads, kv_heads};
        Star large(7936, 256);
        PlanBuffer plan = tts::plan_attention(large.forest.plan_tree(large.branches), std::nullopt, shape);
        std::vector<int64_t> costs = item_costs(View(plan, shape), 4, kv_heads);
        const auto items = static_cast<int64_t>(costs.size());
        CHECK(items >= 24 && items <= std::max<int64_t>(48, 2 * kv_heads + 32));
        // With more heads than items to aim at, a block's trunk is an item for each head, however small.
        CHECK(kv_heads > 32 || std::ranges::max(costs) < 4 * std::ranges::min(costs));

        Star small;
        plan = tts::plan_attention(small.forest.plan_tree(small.branches), std::nullopt, shape);
        costs = item_costs(View(plan, shape), 4, kv_heads);
        CHECK(std::ranges::min(costs) >= 1 << 15);
        CHECK(kv_heads > 32 || std::ranges::max(costs) < 4 * std::ranges::min(costs));
    }
}

void one_long_branch_is_cut_in_pieces() {
    Forest forest(2000, 16);
    const Ints root{forest.add_root()};
    forest.append(root, Ints{32000});
    const PlanShape shape{16, 8, 2};
    PlanBuffer plan = tts::plan_attention(forest.plan_tree(root), std::nullopt, shape);
    const View view(plan, shape);
    CHECK(view.tasks.size() >= 8);
    for (const tts::Segment& s : view.segments) CHECK(s.start % shape.rules.chunk == 0);
}

void a_chunk_starts_behind_the_first_rows_of_its_block() {
    Case c{.forest = Forest(200, 16), .branches = {}, .q_lens = {1500}, .owner = {}};
    c.branches.push_back(c.forest.add_root());
    c.forest.append(c.branches, Ints{2000});
    own_rows(c, /* use_q_lens */ true);
    const PlanShape shape{16, 1, 1};  // 512 rows per block
    PlanBuffer plan = tts::plan_attention(c.forest.plan_tree(c.branches), QLens(c.q_lens), shape);
    check_plan(plan, c, shape);
    const View view(plan, shape);
    CHECK(std::ranges::any_of(view.segments, [](const tts::Segment& s) { return s.row_begin % 512 != 0; }));
}

void a_refill_fits_growth_or_changes_nothing() {
    Star star;
    const PlanShape shape{16, 32, 8};
    PlanBuffer plan = tts::plan_attention(star.forest.plan_tree(star.branches), std::nullopt, shape);
    star.forest.append(star.branches, Ints(256, 300));
    tts::refill_plan(star.forest.plan_tree(star.branches), std::nullopt, shape, plan);
    const View grown(plan, shape);
    CHECK(grown.positions[0] == 1329);

    const std::vector<int32_t> before(plan.data().span().begin(), plan.data().span().end());
    const Ints fewer(star.branches.begin(), star.branches.end() - 1);
    CHECK(contains(thrown<std::invalid_argument>(
                       [&] { tts::refill_plan(star.forest.plan_tree(fewer), std::nullopt, shape, plan); }),
                   "out: expected a plan of 255 rows, got one of 256"));
    star.forest.append(star.branches, Ints(256, 500));
    CHECK(contains(thrown<std::invalid_argument>([&] {
                       tts::refill_plan(star.forest.plan_tree(star.branches), std::nullopt, shape, plan);
                   }),
                   "pages"));
    CHECK(std::ranges::equal(before, plan.data().span()));
}

void bad_tables_are_refused() {
    const std::vector<int32_t> pages = {0, 1, 2, -1};
    const tts::PageTableView table{pages.data(), 4, 2, 1, 2, 2};
    using std::invalid_argument, std::out_of_range;
    CHECK(contains(thrown<invalid_argument>([&] { tts::shared_prefixes(table, Ints{4}, 4); }), "kv_lens"));
    CHECK(contains(thrown<invalid_argument>([&] { tts::shared_prefixes(table, Ints{4, 9}, 4); }),
                   "kv_lens[1]"));
    CHECK(contains(thrown<invalid_argument>([&] { tts::shared_prefixes(table, Ints{-1, 8}, 4); }),
                   "kv_lens[0]"));
    CHECK(contains(thrown<out_of_range>([&] { tts::shared_prefixes(table, Ints{8, 8}, 4); }),
                   "page_table[1, 1]"));
    const PlanTree tree = tts::shared_prefixes(table, Ints{8, 4}, 4);
    const PlanShape shape{4, 1, 1};
    CHECK(contains(thrown<invalid_argument>([&] { tts::plan_attention(tree, QLens(Ints{1}), shape); }),
                   "q_lens"));
    CHECK(contains(thrown<invalid_argument>([&] { tts::plan_attention(tree, QLens(Ints{1, 5}), shape); }),
                   "q_lens[1]"));
}

}  // namespace

int main() {
    for (uint32_t seed = 0; seed < 200; ++seed) plans_read_every_key_once(seed);
    a_trunk_is_read_once_a_block_of_rows();
    a_gpu_gets_many_small_tasks();
    blocks_end_where_trees_end();
    work_items_are_of_about_equal_cost();
    one_long_branch_is_cut_in_pieces();
    a_chunk_starts_behind_the_first_rows_of_its_block();
    a_refill_fits_growth_or_changes_nothing();
    bad_tables_are_refused();
    std::puts("planner: ok");
}
