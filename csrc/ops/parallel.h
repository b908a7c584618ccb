// Loops over threads, as many as torch may use. What an item computes must not depend on who runs it or on
// the cut, must not allocate and must not throw.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "integers.h"
#include "thread_pool.h"

namespace tts::ops {

// How many threads for_units takes if it may take `threads`.
inline int64_t threads_for(int64_t units, int64_t threads) {
    return std::max<int64_t>(
        1, std::min({threads, units, static_cast<int64_t>(torch::stable::get_num_threads())}));
}

// f(unit, who) for every unit in [0, units), on at most `threads` threads, which take the units as they come;
// `who` in [0, threads_for(units, threads)) is the thread, for memory of its own.
template <class F>
void for_units(int64_t units, int64_t threads, const F& f) {
    ThreadPool::instance().run(
        units, threads_for(units, threads),
        [](const void* context, int64_t unit, int64_t who) noexcept {
            (*static_cast<const F*>(context))(unit, who);
        },
        &f);
}

// f(begin, end) for ranges of one size that cover [begin, end). A thread is worth starting for `grain`
// elements; each takes a few ranges where there is enough, so that one that is held up leaves its share to
// the others.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
    constexpr int64_t kRangesPerThread = 4;
    if (begin >= end) return;
    const int64_t count = end - begin,
                  threads = threads_for(divide_up(count, std::max<int64_t>(grain, 1)), INT64_MAX);
    const int64_t ranges =
        std::clamp(count / std::max<int64_t>(grain, 1), threads, threads * kRangesPerThread);
    const int64_t each = divide_up(count, ranges);
    for_units(divide_up(count, each), threads, [&](int64_t range, int64_t) {
        f(begin + range * each, std::min(begin + (range + 1) * each, end));
    });
}

}  // namespace tts::ops
