#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <system_error>

namespace tts {
namespace {

// How long a thread spins before it sleeps. This is longer than the serial code between two ops of a decoder
// layer (a few microseconds), so that a worker is awake when the next op starts, but short enough that other
// programs do not notice.
constexpr std::chrono::microseconds kSpin{200};

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Returns when `word` no longer has the value `old`.
void wait_for_change(std::atomic<uint32_t>& word, uint32_t old) {
    const auto limit = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 16; ++i) {
            if (word.load(std::memory_order_acquire) != old) return;
            relax();
        }
    } while (std::chrono::steady_clock::now() < limit);
    word.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::~ThreadPool() {
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(int64_t count, int64_t threads, RunItem item, const void* context) {
    threads = std::min(threads, count);
    if (threads <= 1 || taken_.exchange(true, std::memory_order_acquire)) {
        for (int64_t i = 0; i < count; ++i) item(context, i, 0);
        return;
    }
    start_workers(threads - 1);
    constexpr auto kMost = static_cast<int64_t>(kClosed);
    for (int64_t begin = 0; begin < count; begin += kMost) {
        run_part(begin, std::min(count - begin, kMost), threads, item, context);
    }
    taken_.store(false, std::memory_order_release);
}

void ThreadPool::run_part(int64_t begin, int64_t count, int64_t threads, RunItem item, const void* context) {
    const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    // The shares of the old job are closed first: then a late worker that reads a new field can no longer
    // claim an item of the old job. Its loads of the fields acquire what these stores release.
    const int64_t old = std::min(threads_.load(std::memory_order_relaxed), kMaxShares);
    const int64_t shares = std::min(threads, kMaxShares);
    for (int64_t i = 0; i < std::max(old, shares); ++i) shares_[i].claim.store(claim_of(epoch, kClosed));
    item_.store(item, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    begin_.store(begin, std::memory_order_release);
    count_.store(count, std::memory_order_release);
    threads_.store(threads, std::memory_order_release);
    done_.store(0, std::memory_order_relaxed);
    for (int64_t i = 0; i < shares; ++i) {
        const auto first = static_cast<uint64_t>(i * count / shares);
        shares_[i].claim.store(claim_of(epoch, first), std::memory_order_release);
    }
    epoch_.store(epoch);
    epoch_.notify_all();

    const auto others = static_cast<uint32_t>(count - help(0));
    for (uint32_t done; (done = done_.load(std::memory_order_acquire)) != others;)
        wait_for_change(done_, done);
}

// Works on the current job until every item is claimed, first in this thread's own share; returns how many
// items this thread ran.
int64_t ThreadPool::help(int64_t who) {
    // The first share is opened when all fields of a job are written. While it is closed, they may still be
    // those of the old job.
    const uint64_t first = shares_[0].claim.load(std::memory_order_acquire), epoch = first >> kEpochShift;
    if ((first & kClosed) == kClosed) return 0;
    const RunItem item = item_.load(std::memory_order_acquire);
    const void* context = context_.load(std::memory_order_acquire);
    const int64_t begin = begin_.load(std::memory_order_acquire);
    const int64_t count = count_.load(std::memory_order_acquire);
    const int64_t threads = threads_.load(std::memory_order_acquire);
    if (who >= threads) return 0;
    const int64_t shares = std::min(threads, kMaxShares);
    int64_t helped = 0;
    for (int64_t i = 0; i < shares; ++i) {
        const int64_t share = (who + i) % shares;
        const auto end = static_cast<uint64_t>((share + 1) * count / shares);
        std::atomic<uint64_t>& next = shares_[share].claim;
        uint64_t claim = next.load(std::memory_order_acquire);
        while (claim >> kEpochShift == epoch && (claim & kClosed) < end) {
            if (!next.compare_exchange_weak(claim, claim + 1, std::memory_order_acq_rel,
                                            std::memory_order_acquire)) {
                continue;
            }
            item(context, begin + static_cast<int64_t>(claim & kClosed), who);
            ++helped;
            claim = next.load(std::memory_order_acquire);
        }
    }
    return helped;
}

void ThreadPool::start_workers(int64_t number) {
    if (static_cast<int64_t>(workers_.size()) >= number) return;
    // Signals are handled by the program's own threads, except those that an instruction raises: their
    // handlers, which may say where it was, run in the thread that met it, or not at all.
    sigset_t others, before;
    sigfillset(&others);
    for (const int raised : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP}) sigdelset(&others, raised);
    pthread_sigmask(SIG_SETMASK, &others, &before);
    try {
        while (static_cast<int64_t>(workers_.size()) < number) {
            const auto who = static_cast<int64_t>(workers_.size()) + 1;
            workers_.emplace_back([this, who] { work(who); });
        }
    } catch (const std::system_error&) {  // no more threads are available: the existing ones do the work
    } catch (const std::bad_alloc&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void ThreadPool::work(int64_t who) {
    for (uint32_t seen = 0; !stop_.load();) {
        wait_for_change(epoch_, seen);
        seen = epoch_.load(std::memory_order_acquire);
        if (const int64_t helped = help(who); helped > 0) {
            done_.fetch_add(static_cast<uint32_t>(helped), std::memory_order_acq_rel);
            done_.notify_one();
        }
    }
}

namespace {

ThreadPool* pool = nullptr;

void forget_pool() {
    pool = new ThreadPool;
}  // the parent's pool is left alone: its threads cannot be joined here

struct Owner {
    Owner() {
        pool = new ThreadPool;
        pthread_atfork(nullptr, nullptr, forget_pool);
    }
    ~Owner() { delete pool; }
};

}  // namespace

ThreadPool& ThreadPool::instance() {
    static Owner owner;
    return *pool;
}

}  // namespace tts
