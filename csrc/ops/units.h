// Units of work of uneven or unpredictable cost, taken by threads as they come.
//
// A unit computes its outputs alone, so who takes it changes nothing but the time.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace tts::ops {

// f(unit) for every unit in [0, units), on at most `threads` threads.
template <class F>
void for_units(int64_t units, int64_t threads, F f) {
    threads = std::min({threads, units, static_cast<int64_t>(torch::stable::get_num_threads())});
    if (threads <= 1) {
        for (int64_t unit = 0; unit < units; ++unit) f(unit);
        return;
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) f(unit);
    });
}

}  // namespace tts::ops
