// Parallel loops, with as many threads as torch may use. The result of an item must not depend on its thread
// or on the cut. An item must not allocate and must not throw.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "integers.h"
#include "thread_pool.h"

namespace tts::ops {

// How many threads for_units uses if it may use `threads`.
inline int64_t threads_for(int64_t units, int64_t threads) {
    return std::max<int64_t>(
        1, std::min({threads, units, static_cast<int64_t>(torch::stable::get_num_threads())}));
}

// Calls f(unit, who) for every unit in [0, units), on at most `threads` threads, which claim units one by
// one. `who` in [0, threads_for(units, threads)) is the number of the thread, for memory of its own.
template <class F>
void for_units(int64_t units, int64_t threads, const F& f) {
    ThreadPool::instance().run(
        units, threads_for(units, threads),
        [](const void* context, int64_t unit, int64_t who) noexcept {
            (*static_cast<const F*>(context))(unit, who);
        },
        &f);
}

// Calls f(begin, end) for ranges of equal size that cover [begin, end). A thread is used for each `grain`
// elements. If there is enough work, each thread takes a few ranges, so that a thread that is held up leaves
// its share to others.
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
