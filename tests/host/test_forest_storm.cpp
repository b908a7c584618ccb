// The KV forest in a storm: random operations with random failures, against a model that stores every token.
//
//   test_forest_storm [operations [seed]]
//
// Many small forests one after another, each with another page size, so that every kind of tree is met often,
// and full pools too. Any operation may run out of memory at any of its allocations, and some are asked for
// what they must refuse: an operation that throws must have changed nothing. The counts of all that happened
// are printed, and each kind must have happened.
#include <algorithm>
#include <array>
#include <new>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "failing_memory.h"
#include "forest.h"
#include "planner.h"

namespace {

using tts::Forest;
using Ints = std::vector<int64_t>;

enum Operation { kAddRoot, kAppend, kFork, kFree, kTruncate, kPlan, kOperations };
enum Outcome { kDone, kDoneWithout, kNoMemory, kNoPages, kRefused, kOutcomes };
constexpr const char* kOperationNames[] = {"add_root", "append", "fork", "free", "truncate", "plan"};
constexpr const char* kOutcomeNames[] = {"done", "done without", "bad_alloc", "OutOfPages", "refused"};

struct Counts {
    std::array<std::array<int64_t, kOutcomes>, kOperations> of{};
    int64_t forests = 0, checks = 0, tokens = 0, copies = 0;

    int64_t all() const {
        int64_t sum = 0;
        for (const auto& outcomes : of) {
            for (const int64_t n : outcomes) sum += n;
        }
        return sum;
    }
    void print() const {
        std::printf("%-10s", "");
        for (const char* name : kOutcomeNames) std::printf("%14s", name);
        for (int op = 0; op < kOperations; ++op) {
            std::printf("\n%-10s", kOperationNames[op]);
            for (const int64_t n : of[op]) std::printf("%14lld", static_cast<long long>(n));
        }
        std::printf(
            "\n%lld operations on %lld forests, %lld tokens appended, %lld pages copied, %lld checks\n",
            static_cast<long long>(all()), static_cast<long long>(forests), static_cast<long long>(tokens),
            static_cast<long long>(copies), static_cast<long long>(checks));
    }
};

// One forest, a cache of one int a slot, and every branch's tokens.
class World {
  public:
    World(uint32_t seed, Counts& counts)
        : random_(seed),
          counts_(counts),
          page_size_(1 + below(below(4) == 0 ? 20 : 5)),
          num_pages_(4 + below(80)),
          most_branches_(2 + below(24)),
          forest_(num_pages_, page_size_),
          cache_(static_cast<size_t>(num_pages_ * page_size_), -1) {
        ++counts_.forests;
    }

    // Returns after so many operations.
    void run(int64_t operations) {
        for (int64_t i = 0; i < operations; ++i) {
            const Operation op = branches_.empty() ? kAddRoot : choose();
            const Outcome outcome = attempt(op);
            ++counts_.of[op][outcome];
            // What threw has changed nothing: the model, which has not changed, says so.
            if (outcome == kNoMemory || outcome == kNoPages || i % 16 == 0) check();
        }
        check();
    }

  private:
    struct Branch {
        int64_t id;
        std::vector<int32_t> tokens;
    };

    int64_t below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }

    Operation choose() {
        const int64_t roll = below(16);
        if (roll < 1) return kAddRoot;
        if (roll < 8) return kAppend;
        if (roll < 11) return kFork;
        if (roll < 13) return kFree;
        return roll < 15 ? kTruncate : kPlan;
    }

    Outcome attempt(Operation op) {
        allocation_failed = false;
        const int64_t failing = below(4) == 0 ? below(1 + below(12)) : -1;
        try {
            switch (op) {
                case kAddRoot:
                    return add_root(failing);
                case kAppend:
                    return append(failing);
                case kFork:
                    return fork(failing);
                case kFree:
                    return free(failing);
                case kTruncate:
                    return truncate(failing);
                default:
                    return plan(failing);
            }
        } catch (const std::bad_alloc&) {
            allocations_left = -1;
            CHECK(allocation_failed);
            return kNoMemory;
        } catch (const tts::OutOfPages& error) {
            allocations_left = -1;
            CHECK(error.needed > error.free && error.free == forest_.stats().pages_free);
            return kNoPages;
        } catch (const std::logic_error&) {  // std::invalid_argument, std::out_of_range
            allocations_left = -1;
            CHECK(refusal_);
            return kRefused;
        }
    }

    // Runs one call of the forest with one of its allocations failing.
    template <class Call>
    auto with_failure(int64_t failing, Call call) {
        struct Reset {
            ~Reset() { allocations_left = -1; }
        } reset;
        allocations_left = failing;
        return call();
    }

    Outcome done() const { return allocation_failed ? kDoneWithout : kDone; }

    Outcome add_root(int64_t failing) {
        refusal_ = false;
        branches_.reserve(branches_.size() + 1);
        branches_.push_back({with_failure(failing, [&] { return forest_.add_root(); }), {}});
        return done();
    }

    // Some branches, in any order. Now and then a list that must be refused: one of them twice, or a dead
    // one.
    std::vector<size_t> some(int64_t one_in) {
        std::vector<size_t> chosen;
        for (size_t i = 0; i < branches_.size(); ++i) {
            if (below(one_in) == 0) chosen.push_back(i);
        }
        std::ranges::shuffle(chosen, random_);
        return chosen;
    }
    Ints ids_of(const std::vector<size_t>& chosen, bool twice_is_wrong) {
        Ints ids;
        for (const size_t i : chosen) ids.push_back(branches_[i].id);
        refusal_ = below(64) == 0 && !ids.empty() && (twice_is_wrong || dead_ >= 0);
        if (refusal_) ids.push_back(twice_is_wrong && (dead_ < 0 || below(2) == 0) ? ids[0] : dead_);
        return ids;
    }

    Outcome append(int64_t failing) {
        const std::vector<size_t> chosen = some(1 + below(4));
        const Ints ids = ids_of(chosen, /* twice_is_wrong */ true);
        const int64_t most = below(32) == 0 ? 60 : 1 + below(2 * page_size_);
        Ints counts;
        for (size_t i = 0; i < ids.size(); ++i) counts.push_back(below(most + 1));
        tts::Append result = with_failure(failing, [&] { return forest_.append(ids, counts); });
        CHECK(!refusal_);
        for (size_t i = 0; i < result.copy_src.size(); ++i) {
            std::copy_n(cache_.begin() + result.copy_src[i] * page_size_, page_size_,
                        cache_.begin() + result.copy_dst[i] * page_size_);
        }
        size_t slot = 0;
        for (size_t i = 0; i < chosen.size(); ++i) {
            for (int64_t n = 0; n < counts[i]; ++n) {
                branches_[chosen[i]].tokens.push_back(next_token_);
                cache_[static_cast<size_t>(result.slots[slot++])] = next_token_++;
            }
        }
        CHECK(slot == result.slots.size());
        counts_.tokens += static_cast<int64_t>(slot);
        counts_.copies += static_cast<int64_t>(result.copy_src.size());
        return done();
    }

    Outcome fork(int64_t failing) {
        std::vector<size_t> chosen;
        const int64_t room = most_branches_ - static_cast<int64_t>(branches_.size());
        for (int64_t n = room > 0 ? 1 + below(std::min<int64_t>(room, 6)) : 0; n > 0; --n) {
            chosen.push_back(static_cast<size_t>(below(static_cast<int64_t>(branches_.size()))));
        }
        const Ints parents = ids_of(chosen, /* twice_is_wrong */ false);
        const Ints children = with_failure(failing, [&] { return forest_.fork(parents); });
        CHECK(!refusal_ && children.size() == chosen.size());
        for (size_t i = 0; i < chosen.size(); ++i) {
            std::vector<int32_t> tokens = branches_[chosen[i]].tokens;
            branches_.push_back({children[i], std::move(tokens)});
        }
        return done();
    }

    Outcome free(int64_t failing) {
        const std::vector<size_t> chosen = some(2 + below(6));
        const Ints ids = ids_of(chosen, /* twice_is_wrong */ true);
        with_failure(failing, [&] { forest_.free(ids); });
        CHECK(!refusal_);
        if (!ids.empty()) dead_ = ids[0];
        std::erase_if(branches_, [&](const Branch& b) { return std::ranges::find(ids, b.id) != ids.end(); });
        maybe_apart_ |= allocation_failed;
        return done();
    }

    Outcome truncate(int64_t failing) {
        Branch& branch = branches_[static_cast<size_t>(below(static_cast<int64_t>(branches_.size())))];
        const auto length = static_cast<int64_t>(branch.tokens.size());
        refusal_ = below(64) == 0;
        const int64_t kept = refusal_        ? length + 1
                             : below(4) == 0 ? below(length + 1)
                                             : length - below(std::min<int64_t>(length, 3) + 1);
        with_failure(failing, [&] { forest_.truncate(branch.id, kept); });
        CHECK(!refusal_);
        branch.tokens.resize(static_cast<size_t>(kept));
        maybe_apart_ |= allocation_failed;
        return done();
    }

    // A plan of some branches, which may be named twice: its tree has their pages, and it has their rows.
    Outcome plan(int64_t failing) {
        const std::vector<size_t> chosen = some(1 + below(3));
        const Ints ids = ids_of(chosen, /* twice_is_wrong */ false);
        const tts::PlanShape shape{.page_size = page_size_, .num_q_heads = 4, .num_kv_heads = 2};
        const auto [tree, rows] = with_failure(failing, [&] {
            tts::PlanTree tree = forest_.plan_tree(ids);
            const int64_t rows = tts::plan_attention(tree, std::nullopt, shape).num_rows();
            return std::pair(std::move(tree), rows);
        });
        CHECK(!refusal_ && rows == static_cast<int64_t>(ids.size()));
        for (size_t i = 0; i < chosen.size(); ++i) check_path(tree, i, branches_[chosen[i]]);
        return done();
    }

    // Whether a tree leads from a branch's leaf up to a root through just the pages that hold its tokens.
    void check_path(const tts::PlanTree& tree, size_t i, const Branch& branch) const {
        const auto length = static_cast<int64_t>(branch.tokens.size());
        CHECK(tree.kv_lens[i] == length);
        int64_t end = (length + page_size_ - 1) / page_size_;
        for (int32_t n = tree.leaf[i]; n >= 0; n = tree.nodes[static_cast<size_t>(n)].parent) {
            const tts::PlanTree::Node& node = tree.nodes[static_cast<size_t>(n)];
            const auto pages = static_cast<int64_t>(node.pages.size());
            CHECK(pages > 0 && node.first_column + pages == end);
            for (int64_t at = node.first_column * page_size_; at < std::min(length, end * page_size_); ++at) {
                const int64_t page = node.pages[static_cast<size_t>(at / page_size_ - node.first_column)];
                CHECK(cache_[static_cast<size_t>(page * page_size_ + at % page_size_)] ==
                      branch.tokens[static_cast<size_t>(at)]);
            }
            end = node.first_column;
        }
        CHECK(end == 0);
    }

    // Every token of every branch is where the forest says, and its counts are the model's.
    void check() {
        ++counts_.checks;
        Ints ids;
        for (const Branch& branch : branches_) ids.push_back(branch.id);
        const tts::PageTable table = forest_.page_table(ids);
        std::vector<bool> held(static_cast<size_t>(num_pages_)), read(cache_.size());
        int64_t logical = 0;
        for (size_t i = 0; i < ids.size(); ++i) {
            const std::vector<int32_t>& tokens = branches_[i].tokens;
            const auto length = static_cast<int64_t>(tokens.size());
            CHECK(table.lengths[i] == length && forest_.length(ids[i]) == length);
            const int32_t* pages = table.pages.data() + static_cast<int64_t>(i) * table.width;
            for (int64_t at = 0; at < length; ++at) {
                const auto page = static_cast<size_t>(pages[at / page_size_]);
                const size_t slot =
                    page * static_cast<size_t>(page_size_) + static_cast<size_t>(at % page_size_);
                CHECK(cache_[slot] == tokens[static_cast<size_t>(at)]);
                held[page] = read[slot] = true;
            }
            logical += length;
        }
        const tts::ForestStats stats = forest_.stats();
        CHECK(stats.branches == static_cast<int64_t>(ids.size()) && stats.logical_tokens == logical);
        CHECK(stats.pages_free == num_pages_ - std::ranges::count(held, true));
        CHECK(stats.unique_tokens == std::ranges::count(read, true));
        // Fewer than two runs a branch, unless memory was missing where two of them were to be joined.
        CHECK(maybe_apart_ || forest_.plan_tree(ids).nodes.size() <= 2 * ids.size());
    }

    std::mt19937 random_;
    Counts& counts_;
    const int64_t page_size_, num_pages_, most_branches_;
    Forest forest_;
    std::vector<int32_t> cache_;
    std::vector<Branch> branches_;
    int64_t dead_ = -1;
    int32_t next_token_ = 0;
    bool refusal_ = false;      // the operation at hand asks for what must be refused
    bool maybe_apart_ = false;  // memory was missing in an operation that may have joined runs
};

}  // namespace

int main(int argc, char** argv) {
    const int64_t operations = argc > 1 ? std::atoll(argv[1]) : 200'000;
    auto seed = static_cast<uint32_t>(argc > 2 ? std::atoll(argv[2]) : 0);
    Counts counts;
    for (int64_t left = operations; left > 0;) {
        const int64_t here = std::min<int64_t>(left, seed % 50 == 49 ? 20'000 : 500);
        World(seed++, counts).run(here);
        left -= here;
    }
    counts.print();
    for (int op = 0; op < kOperations; ++op) CHECK(counts.of[op][kDone] > 0);
    for (const Operation op : {kAddRoot, kAppend, kFork, kTruncate, kPlan})
        CHECK(counts.of[op][kNoMemory] > 0);
    for (const Operation op : {kAppend, kFork, kFree, kTruncate, kPlan}) CHECK(counts.of[op][kRefused] > 0);
    CHECK(counts.of[kAppend][kNoPages] > 0 && counts.copies > 0);
    std::puts("forest storm: ok");
}
