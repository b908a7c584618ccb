// What ThreadSanitizer is told: one TSan fiber a CUDA thread, switches that order nothing, and the order that
// barriers, fences and atomics do make. Without EMU_TSAN these are empty.
//
// PTX orders weak accesses of two threads by fence; strong write -> strong read; fence (or release and
// acquire on the accesses themselves). A fence publishes what came before it, not what came between it and
// the atomic: so a fence saves the thread's clock, and the atomic after it passes on that saved clock,
// through a fiber made for the purpose, because TSan can only pass on the clock of the fiber that runs. The
// same holds at the other end: an atomic notes the clock that it read, and the next fence takes it over.
#pragma once
#include <cstdint>
#include <deque>
#include <unordered_map>
#include <vector>

#if defined(EMU_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emu::tsan {

#if defined(EMU_TSAN)

constexpr unsigned kNoSync = 1;
constexpr size_t kMostFibers = 4000;

// Addresses that stand for clocks: those saved by fences, and those noted by atomics for the next fence; by
// scope (0 block, 1 grid); null until there is one.
struct FenceState {
    char* saved[2] = {nullptr, nullptr};
    char* noted[2] = {nullptr, nullptr};
};

namespace detail {
inline void* scheduler_fiber = nullptr;
inline void* janitor_fiber = nullptr;
inline char all_done;
inline std::deque<void*> finished;
// location and who may see it (a block, by its clocks, or null: the grid) -> the byte that stands for its
// clock
using Key = std::pair<uint64_t, const void*>;
struct Hash {
    size_t operator()(const Key& key) const {
        return key.first * 0x9e3779b97f4a7c15ull ^ reinterpret_cast<uintptr_t>(key.second);
    }
};
inline std::unordered_map<Key, char*, Hash> published;
inline std::deque<std::vector<char>> clocks;
}  // namespace detail

inline void* scheduler() { return detail::scheduler_fiber; }
inline void enter(void* fiber) { __tsan_switch_to_fiber(fiber, kNoSync); }
inline void acquire(char* sync) { __tsan_acquire(sync); }
inline void release(char* sync) { __tsan_release(sync); }

inline void begin() {
    if (!detail::scheduler_fiber) {
        detail::scheduler_fiber = __tsan_get_current_fiber();
        detail::janitor_fiber = __tsan_create_fiber(0);
        __tsan_set_fiber_name(detail::janitor_fiber, "end of a block");
    }
    detail::published.clear();
}
inline void* create(const char* name) {
    void* fiber = __tsan_create_fiber(0);
    __tsan_set_fiber_name(fiber, name);
    return fiber;
}
// TSan tells 255 threads apart and gives a dead one's number to the next that is born, as if they were one:
// so fibers stay until the launch is over, or until there are too many.
inline void destroy(void* fiber) {
    detail::finished.push_back(fiber);
    if (detail::finished.size() < kMostFibers) return;
    __tsan_destroy_fiber(detail::finished.front());
    detail::finished.pop_front();
}
inline void end() {
    for (void* fiber : detail::finished) __tsan_destroy_fiber(fiber);
    detail::finished.clear();
}

// The end of a thread is seen by whoever reads the launch's results and by the janitor, who frees shared
// memory; not by the scheduler before the launch is over, or the next block would come after this one.
inline void release_all() { __tsan_release(&detail::all_done); }
inline void acquire_all() { __tsan_acquire(&detail::all_done); }
template <class Work>
void as_janitor(Work work) {
    enter(detail::janitor_fiber);
    __tsan_acquire(&detail::all_done);
    work();
    enter(detail::scheduler_fiber);
}

// to |= from, as clocks
inline void pass_on(void* running, char* from, char* to) {
    enter(detail::scheduler_fiber);
    void* messenger = __tsan_create_fiber(0);
    enter(messenger);
    __tsan_acquire(from);
    __tsan_release(to);
    enter(detail::scheduler_fiber);
    __tsan_destroy_fiber(messenger);
    enter(running);
}

// Memory is taken and given back in the scheduler's name only: to TSan, a fiber that frees what another has
// written races with it.
template <class Work>
auto as_scheduler(Work work) {
    void* running = __tsan_get_current_fiber();
    enter(detail::scheduler_fiber);
    auto result = work();
    enter(running);
    return result;
}

// Addresses that are never used again in the same process.
inline char* fresh_clocks(size_t count) { return detail::clocks.emplace_back(count).data(); }
inline char* fresh_clock() { return fresh_clocks(1); }
inline char* ensure(char*& clock) { return clock ? clock : clock = as_scheduler(fresh_clock); }

inline char* clock_of(uint64_t address, const void* viewer, bool create) {
    return as_scheduler([&]() -> char* {
        auto found = detail::published.find({address, viewer});
        if (found != detail::published.end()) return found->second;
        return create ? detail::published[{address, viewer}] = fresh_clock() : nullptr;
    });
}

inline void fence(FenceState& state, bool grid) {
    for (int scope = 0; scope <= static_cast<int>(grid); ++scope)
        if (state.noted[scope]) acquire(state.noted[scope]);
    release(ensure(state.saved[grid]));
}

inline void before_atomic(const FenceState& state, void* running, const void* block, uint64_t address,
                          bool releases, bool grid) {
    for (int scope = 0; scope < 2; ++scope) {
        if (!state.saved[scope]) continue;
        pass_on(running, state.saved[scope], clock_of(address, block, true));
        if (scope) pass_on(running, state.saved[scope], clock_of(address, nullptr, true));
    }
    if (releases) {
        release(clock_of(address, block, true));
        if (grid) release(clock_of(address, nullptr, true));
    }
}

inline void after_atomic(FenceState& state, void* running, const void* block, uint64_t address, bool acquires,
                         bool grid) {
    if (char* of_block = clock_of(address, block, false)) {
        if (acquires) acquire(of_block);
        for (int scope = 0; scope < 2; ++scope) pass_on(running, of_block, ensure(state.noted[scope]));
    }
    if (char* of_grid = clock_of(address, nullptr, false)) {
        if (acquires && grid) acquire(of_grid);
        pass_on(running, of_grid, ensure(state.noted[1]));
    }
}

#else

struct FenceState {};
inline char* fresh_clocks(size_t) { return nullptr; }
inline void* scheduler() { return nullptr; }
inline void enter(void*) {}
inline void acquire(char*) {}
inline void release(char*) {}
inline void begin() {}
inline void end() {}
inline void destroy(void*) {}
inline void release_all() {}
inline void acquire_all() {}
template <class Work>
void as_janitor(Work work) {
    work();
}
template <class Work>
auto as_scheduler(Work work) {
    return work();
}

#endif

}  // namespace emu::tsan
