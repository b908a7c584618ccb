// The KV forest against a model that stores every token, and the cases that are easy to get wrong.
#include <algorithm>
#include <map>
#include <new>
#include <random>
#include <set>
#include <span>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "failing_memory.h"
#include "forest.h"

namespace {

using tts::Append;
using tts::Forest;
using Ints = std::vector<int64_t>;

std::vector<int32_t> list(const tts::IntBuffer& buffer) {
    return {buffer.data(), buffer.data() + buffer.size()};
}

std::vector<int32_t> pages_of(const Forest& forest, int64_t branch) {
    return list(forest.page_table(Ints{branch}).pages);
}

int64_t free_pages(const Forest& forest) { return forest.stats().pages_free; }

// A forest, a cache of one int a slot, and every branch's tokens.
class Model {
  public:
    Model(int64_t pages, int64_t page_size)
        : forest(pages, page_size),
          cache_(static_cast<size_t>(pages * page_size), -1),
          page_size_(page_size) {}

    Forest forest;
    std::map<int64_t, std::vector<int>> tokens;

    bool append(const Ints& branches, const Ints& counts) {
        const tts::ForestStats before = forest.stats();
        Append result;
        try {
            result = forest.append(branches, counts);
        } catch (const tts::OutOfPages& error) {
            CHECK(error.free == before.pages_free && error.needed > error.free);
            CHECK(forest.stats().pages_free == before.pages_free);
            return false;
        }
        for (size_t i = 0; i < result.copy_src.size(); ++i) {
            std::copy_n(cache_.begin() + result.copy_src[i] * page_size_, page_size_,
                        cache_.begin() + result.copy_dst[i] * page_size_);
        }
        size_t slot = 0;
        for (size_t i = 0; i < branches.size(); ++i) {
            for (int64_t n = 0; n < counts[i]; ++n) {
                tokens[branches[i]].push_back(next_token_);
                cache_[result.slots[slot++]] = next_token_++;
            }
        }
        CHECK(slot == result.slots.size());
        return true;
    }

    void check() const {
        const tts::ForestStats stats = forest.stats();
        std::set<int32_t> held;
        std::set<int64_t> read;
        int64_t logical = 0;
        for (const auto& [branch, expected] : tokens) {
            CHECK(forest.length(branch) == static_cast<int64_t>(expected.size()));
            const std::vector<int32_t> pages = pages_of(forest, branch);
            CHECK(static_cast<int64_t>(pages.size()) ==
                  (forest.length(branch) + page_size_ - 1) / page_size_);
            held.insert(pages.begin(), pages.end());
            for (size_t i = 0; i < expected.size(); ++i) {
                const int64_t at = static_cast<int64_t>(i);
                const int64_t slot = pages[at / page_size_] * page_size_ + at % page_size_;
                CHECK(cache_[slot] == expected[i]);
                read.insert(slot);
            }
            logical += static_cast<int64_t>(expected.size());
        }
        CHECK(stats.branches == static_cast<int64_t>(tokens.size()));
        CHECK(stats.pages_free + static_cast<int64_t>(held.size()) == stats.pages_total);
        CHECK(stats.logical_tokens == logical);
        CHECK(stats.unique_tokens == static_cast<int64_t>(read.size()));
    }

    // The tree never has more runs than two for each branch, whatever was done to it.
    void check_compact() const {
        Ints all;
        for (const auto& [branch, unused] : tokens) all.push_back(branch);
        CHECK(forest.plan_tree(all).nodes.size() <= 2 * all.size());
    }

  private:
    std::vector<int> cache_;
    int64_t page_size_;
    int next_token_ = 0;
};

void random_operations(uint32_t seed) {
    std::mt19937 random(seed);
    const auto below = [&](size_t n) { return static_cast<int64_t>(random() % n); };
    Model model(/* pages */ 10 + below(60), /* page_size */ 1 + below(5));
    for (int step = 0; step < 300; ++step) {
        Ints ids, some;
        for (const auto& [branch, unused] : model.tokens) ids.push_back(branch);
        std::ranges::shuffle(ids, random);
        std::ranges::copy_if(ids, std::back_inserter(some), [&](int64_t) { return below(3) == 0; });
        switch (ids.empty() ? 0 : below(8)) {
            case 0: {
                const int64_t root = model.forest.add_root();
                model.tokens[root];
                break;
            }
            case 1: {
                if (ids.size() > 20) break;
                const Ints parents{ids[0], ids[0], ids.back()};
                const Ints children = model.forest.fork(parents);
                for (size_t i = 0; i < 3; ++i) model.tokens[children[i]] = model.tokens[parents[i]];
                break;
            }
            case 2: {
                model.forest.free(some);
                for (const int64_t branch : some) model.tokens.erase(branch);
                break;
            }
            case 3: {
                std::vector<int>& tokens = model.tokens[ids[0]];
                tokens.resize(static_cast<size_t>(below(tokens.size() + 1)));
                model.forest.truncate(ids[0], static_cast<int64_t>(tokens.size()));
                break;
            }
            default: {
                Ints counts;
                for (size_t i = 0; i < some.size(); ++i) counts.push_back(below(step % 10 == 0 ? 40 : 4));
                model.append(some, counts);
            }
        }
        model.check();
        model.check_compact();
    }
}

void the_last_holder_writes_in_place() {
    Forest forest(8, 4);
    const int64_t root = forest.add_root();
    forest.append(Ints{root}, Ints{6});
    const Ints children = forest.fork(Ints{root, root});
    forest.free(Ints{root});
    const Append result = forest.append(children, Ints{1, 1});
    CHECK(result.copy_src.size() == 1 && result.copy_src[0] == 1 && result.copy_dst[0] == 2);
    CHECK(result.slots[0] == 2 * 4 + 2 && result.slots[1] == 1 * 4 + 2);
    CHECK((pages_of(forest, children[0]) == std::vector<int32_t>{0, 2}));
    CHECK((pages_of(forest, children[1]) == std::vector<int32_t>{0, 1}));
}

void a_survivor_of_its_parent_copies_nothing() {
    Forest forest(4, 4);
    int64_t branch = forest.add_root();
    forest.append(Ints{branch}, Ints{3});
    const int64_t child = forest.fork(Ints{branch})[0];
    forest.free(Ints{branch});
    CHECK(forest.append(Ints{child}, Ints{1}).copy_src.size() == 0);
    CHECK(forest.stats().pages_free == 3);
}

void a_full_page_is_never_copied() {
    Forest forest(4, 4);
    const int64_t root = forest.add_root();
    forest.append(Ints{root}, Ints{4});
    const Ints children = forest.fork(Ints{root, root});
    CHECK(forest.append(children, Ints{1, 1}).copy_src.size() == 0);
    CHECK(forest.stats().unique_tokens == 6 && forest.stats().logical_tokens == 14);
}

void the_last_page_can_be_filled() {
    Forest forest(2, 4);
    const Ints root{forest.add_root()};
    for (const int64_t count : {3, 4, 1}) forest.append(root, Ints{count});
    CHECK(forest.length(root[0]) == 8 && free_pages(forest) == 0);
    CHECK(contains(thrown<tts::OutOfPages>([&] { forest.append(root, Ints{1}); }), "1 needed, 0 free"));
}

void a_long_chain_stays_one_run() {
    for (const int64_t step : {1, 4, 5}) {  // tokens a link: within, at and across the ends of pages
        Forest forest(40000, 4);
        int64_t branch = forest.add_root();
        for (int i = 0; i < 20000; ++i) {
            const int64_t child = forest.fork(Ints{branch})[0];
            if (i % 2 == 0) forest.free(Ints{branch});
            forest.append(Ints{child}, Ints{step});
            if (i % 2 == 1) forest.free(Ints{branch});
            branch = child;
        }
        CHECK(forest.length(branch) == 20000 * step);
        CHECK(forest.plan_tree(Ints{branch}).nodes.size() == 1);
        CHECK(forest.stats().pages_free == 40000 - 5000 * step);
    }
}

void a_deep_tree_is_given_back_without_recursion() {
    Forest forest(200000, 1);
    Ints chain{forest.add_root()};
    for (int i = 0; i < 100000; ++i) {  // every branch ends one token below the one before
        chain.push_back(forest.fork(Ints{chain.back()})[0]);
        forest.append(Ints{chain.back()}, Ints{1});
    }
    CHECK(forest.plan_tree(Ints{chain.back()}).nodes.size() == 100000);
    const Ints ancestors(chain.begin(), chain.end() - 1);
    forest.free(ancestors);
    CHECK(forest.plan_tree(Ints{chain.back()}).nodes.size() == 1);
    forest.free(Ints{chain.back()});
    CHECK(free_pages(forest) == 200000);
}

void truncation_splits_what_is_shared() {
    Forest forest(16, 4);
    const int64_t a = forest.add_root();
    forest.append(Ints{a}, Ints{14});
    const int64_t b = forest.fork(Ints{a})[0];
    forest.truncate(b, 6);
    CHECK(forest.stats().unique_tokens == 14 && free_pages(forest) == 12);
    const Append result = forest.append(Ints{b}, Ints{3});  // page 1 is still read by a
    CHECK(result.copy_src.size() == 1 && result.copy_src[0] == 1 && result.copy_dst[0] == 4);
    CHECK((pages_of(forest, a) == std::vector<int32_t>{0, 1, 2, 3}));
    CHECK((pages_of(forest, b) == std::vector<int32_t>{0, 4, 5}));
    forest.truncate(b, 0);
    CHECK(free_pages(forest) == 12 && forest.length(b) == 0 && pages_of(forest, b).empty());
}

void errors_name_the_culprit_and_change_nothing() {
    Forest forest(4, 4);
    const int64_t a = forest.add_root(), b = forest.add_root(), c = forest.add_root();
    forest.append(Ints{a, b}, Ints{5, 3});
    forest.free(Ints{c});
    const auto unchanged = [&] {
        return forest.length(a) == 5 && forest.length(b) == 3 && forest.stats().branches == 2 &&
               free_pages(forest) == 1;
    };
    using std::invalid_argument, std::out_of_range;
    CHECK(contains(thrown<out_of_range>([&] { forest.free(Ints{a, 77}); }), "branches[1]"));
    CHECK(contains(thrown<out_of_range>([&] { forest.fork(Ints{a, -1}); }), "parents[1]"));
    CHECK(contains(thrown<out_of_range>([&] { forest.append(Ints{c}, Ints{1}); }), "which was freed"));
    CHECK(contains(thrown<out_of_range>([&] { forest.page_table(Ints{c}); }), "branches[0]"));
    CHECK(contains(thrown<out_of_range>([&] { forest.plan_tree(Ints{c}); }), "branches[0]"));
    CHECK(contains(thrown<invalid_argument>([&] { forest.free(Ints{a, b, a}); }), "branches[2]"));
    CHECK(contains(thrown<invalid_argument>([&] { forest.append(Ints{a, b}, Ints{1}); }), "counts"));
    CHECK(contains(thrown<invalid_argument>([&] { forest.append(Ints{a, b}, Ints{1, -1}); }), "counts[1]"));
    CHECK(contains(thrown<invalid_argument>([&] { forest.append(Ints{a, a}, Ints{1, 1}); }), "branches[1]"));
    CHECK(contains(thrown<invalid_argument>([&] { forest.truncate(a, 6); }), "length"));
    CHECK(contains(thrown<invalid_argument>([&] { forest.truncate(a, -1); }), "length"));
    CHECK(contains(thrown<tts::OutOfPages>([&] { forest.append(Ints{a, b}, Ints{4, 6}); }),
                   "3 needed, 1 free"));
    constexpr int64_t kHuge = INT64_MAX;
    CHECK(
        contains(thrown<tts::OutOfPages>([&] { forest.append(Ints{a, b}, Ints{kHuge, kHuge}); }), "needed"));
    CHECK(unchanged());
    CHECK(contains(thrown<invalid_argument>([&] { Forest(0, 4); }), "num_pages"));
    CHECK(contains(thrown<invalid_argument>([&] { Forest(4, 0); }), "page_size"));
    CHECK(contains(thrown<invalid_argument>([&] { Forest(int64_t{1} << 20, 1 << 11); }), "num_pages"));
}

void ids_are_never_used_again() {
    Forest forest(1, 1);
    const int64_t keeper = forest.add_root();
    int64_t last = keeper;
    for (int i = 0; i < 10000; ++i) {
        const int64_t branch = forest.add_root();
        CHECK(branch > last);
        last = branch;
        forest.free(Ints{branch});
        CHECK(!thrown<std::out_of_range>([&] { forest.length(branch); }).empty());
    }
    CHECK(forest.length(keeper) == 0 && forest.stats().branches == 1);
}

void slots_reach_the_end_of_int32() {
    constexpr int64_t kPages = 2047, kPageSize = 1 << 20;
    Forest forest(kPages, kPageSize);
    Ints roots, ones(kPages, 1);
    for (int64_t i = 0; i < kPages; ++i) roots.push_back(forest.add_root());
    const Append result = forest.append(roots, ones);
    for (int64_t i = 0; i < kPages; ++i) CHECK(result.slots[i] == i * kPageSize);
    CHECK(free_pages(forest) == 0);
}

// What a forest is, as far as one can see.
struct Picture {
    std::vector<std::vector<int32_t>> pages;
    std::vector<int64_t> numbers;
    bool operator==(const Picture&) const = default;
};

Picture picture(const Forest& forest, const Ints& branches) {
    const tts::ForestStats s = forest.stats();
    Picture result{{}, {s.branches, s.pages_free, s.logical_tokens, s.unique_tokens}};
    for (const int64_t branch : branches) {
        result.pages.push_back(pages_of(forest, branch));
        result.numbers.push_back(forest.length(branch));
    }
    return result;
}

// Runs an operation on trees of some depth with each of its allocations failing in turn.
template <class Operation>
void without_memory(Operation run) {
    for (int64_t failing = 0;; ++failing) {
        Forest forest(20000, 4);
        Ints ids{forest.add_root(), forest.add_root()};
        forest.append(ids, Ints{70, 1});
        for (const int64_t child : forest.fork(Ints{ids[0], ids[0], ids[0]})) ids.push_back(child);
        forest.append(Ints{ids[2], ids[3]}, Ints{30, 5});
        for (const int64_t child : forest.fork(Ints(300, ids[3]))) ids.push_back(child);
        forest.free(Ints{ids[3]});
        ids.erase(ids.begin() + 3);
        const Picture before = picture(forest, ids);
        bool failed = false;
        allocations_left = failing;
        try {
            run(forest, ids);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
        const bool ran = allocations_left >= 0;  // to its end, needing no more
        allocations_left = -1;
        if (ran) return;
        if (!failed) continue;  // did without
        CHECK(picture(forest, ids) == before);
        forest.append(ids, Ints(ids.size(), 1));
        forest.free(ids);
        CHECK(free_pages(forest) == 20000);
    }
}

void without_memory_nothing_changes() {
    without_memory([](Forest& f, const Ints&) { f.add_root(); });
    without_memory([](Forest& f, const Ints& ids) { f.fork(Ints(1000, ids[0])); });
    without_memory([](Forest& f, const Ints& ids) { f.free(ids); });
    without_memory([](Forest& f, const Ints& ids) { f.free(Ints{ids[0], ids[3]}); });
    for (const int64_t length : {0, 3, 16, 66}) {
        without_memory([=](Forest& f, const Ints& ids) { f.truncate(ids[2], length); });
        without_memory([=](Forest& f, const Ints& ids) { f.truncate(ids[5], length); });
    }
    // To branches that have a run to themselves, whether or not its list has room, and to all at once.
    without_memory([](Forest& f, const Ints& ids) { f.append(Ints{ids[1]}, Ints{40000}); });
    without_memory([](Forest& f, const Ints& ids) { f.append(Ints{ids[2]}, Ints{40000}); });
    without_memory([](Forest& f, const Ints& ids) { f.append(ids, Ints(ids.size(), 7)); });
}

}  // namespace

int main() {
    for (uint32_t seed = 0; seed < 200; ++seed) random_operations(seed);
    the_last_holder_writes_in_place();
    a_survivor_of_its_parent_copies_nothing();
    a_full_page_is_never_copied();
    the_last_page_can_be_filled();
    a_long_chain_stays_one_run();
    a_deep_tree_is_given_back_without_recursion();
    truncation_splits_what_is_shared();
    errors_name_the_culprit_and_change_nothing();
    ids_are_never_used_again();
    slots_reach_the_end_of_int32();
    without_memory_nothing_changes();
    std::puts("forest: ok");
}
