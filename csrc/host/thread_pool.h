// The threads that share the work of an op.
//
// The work is a number of items, which threads claim one by one. Each thread begins in a share of its own,
// which is the same in every call, and then helps with the shares of others. So what a thread wrote in one op
// is mostly in its own cache when the next op reads or writes it. The caller claims items, too. At the end it
// waits only for items that other threads have started. So a thread that the operating system has taken off
// its core costs nothing while it holds no item. With a fixed part for each thread (OpenMP's barriers), every
// call would wait for a time slice whenever another program on the machine is busy.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace tts {

class ThreadPool {
  public:
    // Runs item `item`. `who` is below the number of threads, and two threads never have the same number at a
    // time. It must not throw, because it may run where no code can catch.
    using RunItem = void (*)(const void* context, int64_t item, int64_t who) noexcept;

    ThreadPool() = default;
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // Runs items [0, count) on at most `threads` threads, including the caller; returns when all are done. If
    // there are two callers at once, or an item calls it, the second call works alone.
    void run(int64_t count, int64_t threads, RunItem item, const void* context);

    // The pool of the process. A forked child gets a new pool, because it does not have its parent's threads.
    static ThreadPool& instance();

  private:
    // A claim has the epoch of a job in its upper half and the next item of a share in its lower half.
    // Because this is one word, a thread that claims an item knows that it has read the fields of the same
    // job. No job has the last item; it closes a share while the fields are written.
    static constexpr int kEpochShift = 32;
    static constexpr uint64_t kClosed = (uint64_t{1} << kEpochShift) - 1;
    static uint64_t claim_of(uint32_t epoch, uint64_t item) {
        return (static_cast<uint64_t>(epoch) << kEpochShift) | item;
    }

    void run_part(int64_t begin, int64_t count, int64_t threads, RunItem item, const void* context);
    void start_workers(int64_t number);
    void work(int64_t who);
    int64_t help(int64_t who);

    static constexpr int64_t kMaxShares = 64;  // with more threads, several begin in the same share
    struct alignas(64) Share {                 // a cache line of its own
        std::atomic<uint64_t> claim{0};
    };

    std::atomic<bool> taken_{false};
    // The job. A late worker may read it while the next job is being written; its claim then fails.
    std::atomic<RunItem> item_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<int64_t> begin_{0};
    std::atomic<int64_t> count_{0};
    std::atomic<int64_t> threads_{0};
    Share shares_[kMaxShares];

    // Each on a cache line of its own: they are written while others spin on them.
    alignas(64) std::atomic<uint32_t> done_{0};  // items that workers have finished
    alignas(64) std::atomic<uint32_t> epoch_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> workers_;
};

}  // namespace tts
