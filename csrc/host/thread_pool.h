// The threads that share an op's work.
//
// Work is a number of items that are claimed one by one. The caller claims too, and waits at the end only for
// items that another thread has begun: a thread that the operating system has taken off its core costs the
// caller nothing as long as it holds no item. Where each thread has a fixed part instead (OpenMP's barriers),
// every call waits for a time slice as soon as one neighbour on the machine is busy.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace tts {

class ThreadPool {
  public:
    // Runs item `item`; `who` is below the number of threads, and no two threads are the same one at a time.
    // Must not throw: it may run where nobody can catch.
    using RunItem = void (*)(const void* context, int64_t item, int64_t who) noexcept;

    ThreadPool() = default;
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // Runs items [0, count) on at most `threads` threads, the caller among them; returns when all are done.
    // Two callers at once, or an item that calls: whoever comes second works alone.
    void run(int64_t count, int64_t threads, RunItem item, const void* context);

    // The pool of the process. A child that was forked gets a new one: its parent's threads are not there.
    static ThreadPool& instance();

  private:
    // A claim is the epoch of a job in the upper half and its next item in the lower one: one word, so that
    // whoever claims an item knows that the job is still the one whose fields it has read. No job has the
    // last item, which closes an epoch while its fields are written.
    static constexpr int kEpochShift = 32;
    static constexpr uint64_t kClosed = (uint64_t{1} << kEpochShift) - 1;
    static uint64_t claim_of(uint32_t epoch, uint64_t item) {
        return (static_cast<uint64_t>(epoch) << kEpochShift) | item;
    }

    void run_part(int64_t begin, int64_t count, int64_t threads, RunItem item, const void* context);
    void start_workers(int64_t number);
    void work(int64_t who);
    int64_t help(int64_t who);

    std::atomic<bool> taken_{false};
    // The job. A late worker may read it while the next one is being written; it then fails to claim.
    std::atomic<RunItem> item_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<int64_t> begin_{0};
    std::atomic<uint64_t> count_{0};
    std::atomic<int64_t> threads_{0};

    // Each on a cache line of its own: they are written while others spin on them.
    alignas(64) std::atomic<uint64_t> claim_{0};
    alignas(64) std::atomic<uint32_t> done_{0};  // items that workers have finished
    alignas(64) std::atomic<uint32_t> epoch_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> workers_;
};

}  // namespace tts
