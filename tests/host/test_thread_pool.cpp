// Threads that claim items: each item once, whoever calls, whatever else runs, in a forked child too.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "check.h"
#include "thread_pool.h"

// The thread sanitizer ends a forked child that starts threads, unless it is told not to: it is a shared
// library, which must see this.
extern "C" [[gnu::visibility("default")]] const char* __tsan_default_options() { return "die_after_fork=0"; }

namespace {

using tts::ThreadPool;

template <class F>
void run(ThreadPool& pool, int64_t count, int64_t threads, const F& f) {
    pool.run(
        count, threads,
        [](const void* context, int64_t item, int64_t who) noexcept {
            (*static_cast<const F*>(context))(item, who);
        },
        &f);
}

// How often each of `count` items ran; not atomic, so that the thread sanitizer sees two threads at one item.
std::vector<int> times_run(ThreadPool& pool, int64_t count, int64_t threads) {
    std::vector<int> times(static_cast<size_t>(count), 0);
    run(pool, count, threads, [&](int64_t item, int64_t) { ++times[static_cast<size_t>(item)]; });
    return times;
}

void each_item_runs_once() {
    ThreadPool pool;
    for (int64_t threads : {1, 2, 3, 8}) {
        for (int64_t count : {0, 1, 2, 3, 17, 1000}) {
            CHECK(times_run(pool, count, threads) == std::vector<int>(static_cast<size_t>(count), 1));
        }
    }
    CHECK(times_run(pool, 1000, 70) == std::vector<int>(1000, 1));  // more threads than shares
}

// What an instruction raises in a worker reaches its handler; other signals go to the program's own threads.
void workers_handle_only_what_they_raise() {
    ThreadPool pool;
    std::atomic<int> helped{0};
    run(pool, 1000, 2, [&](int64_t, int64_t who) {
        usleep(100);
        if (who == 0) return;
        ++helped;
        sigset_t blocked;
        pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
        for (const int raised : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) CHECK(!sigismember(&blocked, raised));
        for (const int sent : {SIGINT, SIGTERM, SIGUSR1}) CHECK(sigismember(&blocked, sent));
    });
    CHECK(helped > 0);
}

// Where nobody helps, the caller takes its own share from the front, then the others'.
void each_thread_begins_in_its_share() {
    ThreadPool pool;
    for (int64_t threads : {2, 3, 8}) {
        std::vector<int64_t> first(static_cast<size_t>(threads), -1);  // of each thread
        run(pool, 240, threads, [&](int64_t item, int64_t who) {
            int64_t& own = first[static_cast<size_t>(who)];
            if (own < 0) own = item;
            usleep(100);
        });
        for (int64_t who = 0; who < threads; ++who) {  // a worker that came late found its share taken
            const int64_t begin = who * 240 / threads, end = (who + 1) * 240 / threads,
                          own = first[static_cast<size_t>(who)];
            CHECK(who == 0 ? own == 0 : own == -1 || own >= begin);
            if (own >= 0 && own < end) CHECK(own == begin || who != 0);
        }
    }
}

// Jobs of a few items, one straight after the other: late workers meet fields that are being written.
void short_jobs_do_not_mix() {
    ThreadPool pool;
    for (int64_t job = 0; job < 20000; ++job) {
        const int64_t count = 1 + job % 5;
        CHECK(times_run(pool, count, 2 + job % 3) == std::vector<int>(static_cast<size_t>(count), 1));
    }
}

// A worker must never run an item with what belonged to the job before: here that is gone.
void old_jobs_are_not_run_again() {
    struct Job {
        std::atomic<bool> is_on{true};
        std::atomic<int64_t> ran{0}, late{0};
    };
    ThreadPool pool;
    std::vector<Job> jobs(4);
    int64_t late = 0;
    for (int64_t number = 0; number < 1000000; ++number) {
        Job& job = jobs[static_cast<size_t>(number % 4)];
        late += job.late.exchange(0);
        job.is_on = true, job.ran = 0;
        const int64_t count = 2 + number % 3;
        run(pool, count, 2 + number % 2, [&job](int64_t, int64_t) {
            if (!job.is_on) job.late.fetch_add(1);
            job.ran.fetch_add(1);
        });
        CHECK(job.ran == count);
        job.is_on = false;
    }
    CHECK(late == 0);
}

void who_is_below_the_threads_and_one_at_a_time() {
    ThreadPool pool;
    for (int64_t threads : {8, 2, 5}) {
        std::vector<int64_t> own(static_cast<size_t>(threads), 0);  // the sanitizer sees two of one number
        run(pool, 5000, threads, [&](int64_t, int64_t who) { ++own[static_cast<size_t>(who)]; });
        int64_t sum = 0;
        for (int64_t n : own) sum += n;
        CHECK(sum == 5000);
    }
}

void a_call_in_an_item_and_a_second_caller_work_alone() {
    ThreadPool pool;
    std::atomic<int64_t> inner{0};
    run(pool, 20, 3,
        [&](int64_t, int64_t) { run(pool, 10, 3, [&](int64_t, int64_t) { inner.fetch_add(1); }); });
    CHECK(inner == 200);
    std::vector<std::thread> callers;
    std::atomic<int64_t> sum{0};
    for (int c = 0; c < 4; ++c) {
        callers.emplace_back([&] {
            for (int i = 0; i < 500; ++i) {
                for (int n : times_run(pool, 7, 3)) sum.fetch_add(n);
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    CHECK(sum == 4 * 500 * 7);
}

void sleeping_workers_wake_up() {
    ThreadPool pool;
    for (int i = 0; i < 20; ++i) {
        CHECK(times_run(pool, 64, 3) == std::vector<int>(64, 1));
        usleep(1000);  // longer than they spin
    }
}

void a_forked_child_has_threads_of_its_own() {
    ThreadPool& parent = ThreadPool::instance();
    CHECK(times_run(parent, 100, 3) == std::vector<int>(100, 1));
    const pid_t child = fork();
    if (child == 0) {
        std::atomic<int64_t> helped{0};
        // Until a worker has taken an item: in a child without threads of its own none ever does.
        for (int i = 0; i < 100000 && helped == 0; ++i) {
            run(ThreadPool::instance(), 100, 3, [&](int64_t, int64_t who) {
                if (who != 0) helped.fetch_add(1);
                usleep(10);
            });
        }
        _exit(helped > 0 ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(status == 0);
    CHECK(times_run(ThreadPool::instance(), 100, 3) == std::vector<int>(100, 1));
}

}  // namespace

int main() {
    each_item_runs_once();
    workers_handle_only_what_they_raise();
    each_thread_begins_in_its_share();
    short_jobs_do_not_mix();
    old_jobs_are_not_run_again();
    who_is_below_the_threads_and_one_at_a_time();
    a_call_in_an_item_and_a_second_caller_work_alone();
    sleeping_workers_wake_up();
    a_forked_child_has_threads_of_its_own();
    return 0;
}
