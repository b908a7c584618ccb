// Threads: torch's own, by ranges or by units of uneven cost.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

#include "integers.h"

namespace tts::ops {

#if defined(__SANITIZE_THREAD__)

// ThreadSanitizer cannot see the barriers of torch's OpenMP, so its build starts and joins threads of its
// own.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
    const int64_t most = divide_up(end - begin, std::max<int64_t>(grain, 1));
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), most);
    if (threads <= 1) {
        if (begin < end) f(begin, end);
        return;
    }
    const int64_t each = divide_up(end - begin, threads);
    std::vector<std::thread> team;
    for (int64_t at = begin; at < end; at += each) team.emplace_back(f, at, std::min(at + each, end));
    for (std::thread& thread : team) thread.join();
}

#else

using torch::stable::parallel_for;

#endif

// How many threads for_units takes if it may take `threads`.
inline int64_t threads_for(int64_t units, int64_t threads) {
    return std::max<int64_t>(
        1, std::min({threads, units, static_cast<int64_t>(torch::stable::get_num_threads())}));
}

// f(unit) for every unit in [0, units), on at most `threads` threads, which take the units as they come. A
// unit computes its outputs alone, so who takes it changes nothing but the time.
template <class F>
void for_units(int64_t units, int64_t threads, F f) {
    threads = threads_for(units, threads);
    if (threads <= 1) {
        for (int64_t unit = 0; unit < units; ++unit) f(unit);
        return;
    }
    std::atomic<int64_t> next{0};
    parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) f(unit);
    });
}

}  // namespace tts::ops
