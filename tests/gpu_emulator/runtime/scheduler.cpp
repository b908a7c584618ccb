// Runs the threads of a block as fibers on one core: barriers, warp-wide operations, checks of memory, and
// the happens-before relation that ThreadSanitizer is told of. This file is never instrumented.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "launch.h"
#include "tsan.h"

#if defined(EMU_ASAN)
extern "C" {
void __asan_on_error();  // called before a report is printed
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_poison_memory_region(const volatile void* address, size_t size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif

namespace emu {

namespace {

#if defined(EMU_ASAN) || defined(EMU_TSAN)
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kGuardBytes = 4096;
constexpr u32 kBarriers = 16;
constexpr u32 kTicks = 4096;  // backward branches between two switches

enum class State : u8 { kReady, kBarrier, kLanes, kActiveMask, kExited };

struct Block;

struct Thread {
    Context context{};  // first: `self` points here
    Fiber fiber;
    Block* block = nullptr;
    u32 index = 0;
    void* stack = nullptr;

    u32 line = 0;  // where it waits, or where it exited
    // at a barrier
    u32 barrier = 0;
    BarrierResult barrier_result{};
    // at a warp-wide operation
    u32 mask = 0;
    const char* kind = "";
    void* operand = nullptr;
    Combine combine = nullptr;
    bool absent_allowed = false, any_line = false;
    u32 sync_slot = 0;

    std::vector<Copy> copies, due;   // cp.async: issued in order; those to be performed now
    std::vector<size_t> group_ends;  // ends of committed groups within `copies`

    void* tsan = nullptr;
    tsan::FenceState fences;
    void* fake_stack = nullptr;
};

struct Barrier {
    u32 arrived = 0, expected = 0, votes = 0, line = 0, generation = 0;
    bool whole = false;  // for all threads of the block, as __syncthreads
};

struct Warp {
    Thread* lanes[32] = {};
    u32 next_slot = 0;
};

constexpr u32 kMeetings = 64;  // of a warp, that have a clock each

struct Block {
    Dim3 index{};
    std::vector<Thread> threads;
    std::vector<State> states;
    std::vector<Warp> warps;
    Barrier barriers[kBarriers];
    // Clocks, one for each parity of a barrier's generation and for each meeting of a warp; no other block
    // has had them, or it would come before this one.
    char* clocks = nullptr;
    bool apart = true;  // TSan tells its threads apart
    u8* shared = nullptr;
    u32 exited = 0, first_exited = 0, at_active_mask = 0;
    u32 copies_in_flight = 0;
    std::vector<u8> in_flight;  // a mark for each 4 bytes of shared memory
    std::vector<u64> stored;  // for each byte of it: after which barrier and by which line, for is_duplicate
};

struct Buffer {
    u64 lo, size;
    std::string name;
};

std::vector<Buffer> buffers;

// The launch in progress.
struct Run {
    const EmuLaunch* launch = nullptr;
    const Kernel* kernel = nullptr;
    const u8* params = nullptr;
    EmuFault* fault = nullptr;
    bool faulted = false;
    std::mt19937_64 random;
    Fiber scheduler;
    Thread* running = nullptr;
    u32 ticks = kTicks;
    std::chrono::steady_clock::time_point deadline;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    u64 grid_workspace[4] = {};
} run;

// ---- switching ----
void switch_to_thread(Thread& thread) {
    run.running = &thread;
    self = &thread.context;
    cp_async_live = &thread.block->copies_in_flight;
    tsan::enter(thread.tsan);
#if defined(EMU_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, thread.stack, kStackBytes);
#endif
    switch_fiber(run.scheduler, thread.fiber);
#if defined(EMU_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void switch_to_scheduler() {
    Thread& thread = *run.running;
    tsan::enter(tsan::scheduler());
#if defined(EMU_ASAN)
    __sanitizer_start_switch_fiber(&thread.fake_stack, run.scheduler_stack, run.scheduler_stack_size);
#endif
    switch_fiber(thread.fiber, run.scheduler);
#if defined(EMU_ASAN)
    __sanitizer_finish_switch_fiber(thread.fake_stack, &run.scheduler_stack, &run.scheduler_stack_size);
#endif
}

void wait_as(State state, u32 line) {
    Thread& thread = *run.running;
    thread.line = line;
    thread.block->states[thread.index] = state;
    switch_to_scheduler();
}

void fiber_start() {
#if defined(EMU_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &run.scheduler_stack, &run.scheduler_stack_size);
#endif
    run.kernel->entry(run.params);
    exit_thread();
}

// ---- faults ----
void record_fault(const Thread* thread, const char* kind, u32 line, const char* format, va_list arguments) {
    EmuFault& fault = *run.fault;
    std::snprintf(fault.kind, sizeof fault.kind, "%s", kind);
    fault.line = line;
    if (thread) {
        const Dim3 b = thread->context.ctaid, t = thread->context.tid;
        const u32 block[3] = {b.x, b.y, b.z}, tid[3] = {t.x, t.y, t.z};
        std::copy_n(block, 3, fault.block);
        std::copy_n(tid, 3, fault.thread);
    }
    std::vsnprintf(fault.text, sizeof fault.text, format, arguments);
    run.faulted = true;
}

// Ends the launch: nothing resumes after a fault. `thread` is the one to name.
void fault_of(const Thread& thread, const char* kind, u32 line, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    record_fault(&thread, kind, line, format, arguments);
    va_end(arguments);
}

std::string where(const Thread& thread) {
    char text[96];
    const Dim3 t = thread.context.tid;
    std::snprintf(text, sizeof text, "thread (%u,%u,%u)", t.x, t.y, t.z);
    return text;
}

std::string doing(const Thread& thread) {
    char text[160];
    switch (thread.block->states[thread.index]) {
        case State::kReady:
            return "runs";
        case State::kExited:
            return "has exited";
        case State::kBarrier:
            std::snprintf(text, sizeof text, "waits at barrier %u (line %u)", thread.barrier, thread.line);
            return text;
        case State::kLanes:
            std::snprintf(text, sizeof text, "waits at %s (line %u) with mask %#010x", thread.kind,
                          thread.line, thread.mask);
            return text;
        case State::kActiveMask:
            return "waits at activemask";
    }
    return "";
}

// ---- stacks: as many as a large block has are kept from launch to launch ----
// A thread's locals lie where another block's thread had its own before. TSan would take that for a race, so
// for TSan a stack is mapped anew for each thread, which makes it forget who wrote there.
class Stacks {
  public:
    void* get(size_t index) {
#if defined(EMU_TSAN)
        if (index < stacks_.size()) return renew(stacks_[index]);
#endif
        while (stacks_.size() <= index) {
            void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED) std::perror("mmap of a fiber's stack"), std::abort();
            mprotect(memory, kGuardBytes, PROT_NONE);
            stacks_.push_back(static_cast<u8*>(memory) + kGuardBytes);
        }
        return stacks_[index];
    }

    // Gives back those of blocks that ran at once: a process has 65,530 mappings, a stack and its guard are
    // two, and each kernel has stacks of its own.
    void trim() {
        for (; stacks_.size() > kKept; stacks_.pop_back())
            munmap(static_cast<u8*>(stacks_.back()) - kGuardBytes, kGuardBytes + kStackBytes);
    }

  private:
    static constexpr size_t kKept = 1024;

    static void* renew(void* stack) {
        void* memory = mmap(stack, kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        if (memory == MAP_FAILED) std::perror("mmap of a fiber's stack"), std::abort();
        return memory;
    }

    std::vector<void*> stacks_;
} stacks;

// ---- shared memory ----
u32 shared_bytes() { return run.kernel->dynamic_offset + run.launch->dynamic_smem; }

// Calls visit(name, offset, size) for each variable in shared memory, the dynamic part last.
template <class Visit>
void each_shared(Visit visit) {
    for (u32 i = 0; i < run.kernel->num_shared; ++i) {
        const Variable& variable = run.kernel->shared[i];
        visit(variable.name, static_cast<u32>(variable.address), static_cast<u32>(variable.size));
    }
    visit("dynamic shared memory", run.kernel->dynamic_offset, run.launch->dynamic_smem);
}

void allocate_shared(Block& block) {
    const u32 bytes = shared_bytes();
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, std::max(bytes, 1u))) std::abort();
    std::memset(memory, 0xff, bytes);
    block.shared = static_cast<u8*>(memory);
    block.in_flight.assign(bytes / 4 + 1, 0);
    block.stored.assign(run.launch->duplicate_stores ? bytes : 0, 0);
#if defined(EMU_ASAN)
    __asan_poison_memory_region(block.shared, bytes);
    each_shared([&](const char*, u32 offset, u32 size) {
        __asan_unpoison_memory_region(block.shared + offset, size);
    });
#endif
}

void free_shared(Block& block) {
#if defined(EMU_ASAN)
    __asan_unpoison_memory_region(block.shared, shared_bytes());
#endif
    tsan::as_janitor([&] { std::free(block.shared); });
}

// ---- warp-wide operations ----
bool same_operation(const Thread& a, const Thread& b) {
    return a.mask == b.mask && (a.kind == b.kind || std::strcmp(a.kind, b.kind) == 0) &&
           (a.any_line || a.line == b.line);
}

// Finishes the operation that `thread` waits at if all lanes have come. False: not yet, or a fault.
bool complete_lanes(Thread& thread) {
    Block& block = *thread.block;
    Warp& warp = block.warps[thread.context.warp];
    void* operands[32] = {};
    u32 present = 0;
    for (u32 i = 0; i < 32; ++i) {
        if (!(thread.mask >> i & 1)) continue;
        const Thread* other = warp.lanes[i];
        if (!other || block.states[other->index] == State::kExited) {
            if (thread.absent_allowed) continue;
            fault_of(thread, "absent-lane", thread.line, "%s with mask %#010x names lane %u, which %s",
                     thread.kind, thread.mask, i, other ? "has exited" : "does not exist in this block");
            return false;
        }
        if (block.states[other->index] != State::kLanes || !same_operation(thread, *other)) return false;
        operands[i] = other->operand;
        present |= 1u << i;
    }
    if (thread.combine) thread.combine(operands, present);
    for (u32 i = 0; i < 32; ++i)
        if (present >> i & 1) block.states[warp.lanes[i]->index] = State::kReady;
    return true;
}

// A lane is gone: what its warp waits for may be complete now, or never be.
void recheck_warp(Warp& warp, Block& block) {
    for (Thread* lane : warp.lanes)
        if (lane && block.states[lane->index] == State::kLanes && !run.faulted) complete_lanes(*lane);
}

// ---- activemask ----
// Lanes of a warp that wait at the same instruction, none of the others running, are converged.
void resolve_active_masks(Block& block, Warp& warp) {
    for (Thread* lane : warp.lanes)
        if (lane && block.states[lane->index] == State::kReady) return;
    for (Thread* first : warp.lanes) {
        if (!first || block.states[first->index] != State::kActiveMask) continue;
        const u32 keep =
            run.launch->split_masks ? static_cast<u32>(run.random()) | 1u << first->context.lane : ~0u;
        u32 mask = 0;
        for (u32 i = 0; i < 32; ++i) {
            const Thread* lane = warp.lanes[i];
            const bool converged =
                lane && block.states[lane->index] == State::kActiveMask && lane->line == first->line;
            if (converged && (keep >> i & 1)) mask |= 1u << i;
        }
        for (u32 i = 0; i < 32; ++i) {
            if (!(mask >> i & 1)) continue;
            warp.lanes[i]->mask = mask;
            block.states[warp.lanes[i]->index] = State::kReady;
            --block.at_active_mask;
        }
    }
}

// ---- running blocks ----
void start_thread(Block& block, u32 index, size_t stack_index) {
    Thread& thread = block.threads[index];
    const EmuLaunch& launch = *run.launch;
    Context& context = thread.context;
    context.ntid = {launch.block[0], launch.block[1], launch.block[2]};
    context.nctaid = {launch.grid[0], launch.grid[1], launch.grid[2]};
    context.ctaid = block.index;
    context.tid = {index % launch.block[0], index / launch.block[0] % launch.block[1],
                   index / launch.block[0] / launch.block[1]};
    context.lane = index % 32;
    context.warp = index / 32;
    context.shared = block.shared;
    context.dynamic_smem = launch.dynamic_smem;
    context.total_smem = shared_bytes();
    context.dynamic_shared = kSharedStart + run.kernel->dynamic_offset;
    context.grid_workspace = launch.cooperative ? reinterpret_cast<u64>(run.grid_workspace) : 0;
    context.param = run.params;
    context.frames = nullptr;
    thread.block = &block;
    thread.index = index;
    thread.copies.clear();
    thread.group_ends.clear();
    thread.stack = stacks.get(stack_index);
    block.warps[context.warp].lanes[context.lane] = &thread;
    make_fiber(thread.fiber, thread.stack, kStackBytes, fiber_start);
#if defined(EMU_TSAN)
    char name[96];
    const Dim3 b = block.index, t = context.tid;
    if (block.apart) {
        std::snprintf(name, sizeof name, "block (%u,%u,%u) thread (%u,%u,%u)", b.x, b.y, b.z, t.x, t.y, t.z);
    } else {
        std::snprintf(name, sizeof name, "block (%u,%u,%u)", b.x, b.y, b.z);
    }
    thread.tsan = block.apart || index == 0 ? tsan::create(name) : block.threads[0].tsan;
    thread.fences = {};
#endif
}

// `turn`: how many blocks have started before, of `total`.
void start_block(Block& block, u32 number, u32 turn, u32 total, size_t first_stack) {
    const EmuLaunch& launch = *run.launch;
    const u32 first = launch.first_apart, last = launch.last_apart;
    block.apart = first + last == 0 || turn < first || turn + last >= total;
    const u32 size = launch.block[0] * launch.block[1] * launch.block[2];
    block.index = {number % launch.grid[0], number / launch.grid[0] % launch.grid[1],
                   number / launch.grid[0] / launch.grid[1]};
    block.threads.resize(size);
    block.states.assign(size, State::kReady);
    block.warps.assign((size + 31) / 32, Warp{});
    for (Barrier& barrier : block.barriers) barrier = Barrier{};
    block.clocks = tsan::fresh_clocks(2 * kBarriers + block.warps.size() * kMeetings);
    block.exited = block.at_active_mask = block.copies_in_flight = 0;
    allocate_shared(block);
    for (u32 i = 0; i < size; ++i) start_thread(block, i, first_stack + i);
}

void finish_block(Block& block) {
    for (Thread& thread : block.threads)
        if (block.apart || thread.index == 0) tsan::destroy(thread.tsan);
    free_shared(block);
}

void report_deadlock(std::vector<Block>& blocks) {
    const Thread* named = nullptr;
    for (Block& block : blocks)
        for (Thread& thread : block.threads) {
            const State state = block.states[thread.index];
            if (state == State::kExited) continue;
            if (!named || (state == State::kLanes && block.states[named->index] != State::kLanes))
                named = &thread;
        }
    const Block& block = *named->block;
    std::string others;
    u32 listed = 0;
    for (const Thread& other : block.threads) {
        const bool lanes = block.states[named->index] == State::kLanes;
        if (lanes && (other.context.warp != named->context.warp || !(named->mask >> other.context.lane & 1)))
            continue;
        if (other.line == named->line && block.states[other.index] == block.states[named->index]) continue;
        if (listed++ < 4) others += "; " + where(other) + " " + doing(other);
    }
    if (listed > 4) others += "; and " + std::to_string(listed - 4) + " more";
    const bool lanes = block.states[named->index] == State::kLanes;
    fault_of(*named, lanes ? "absent-lane" : "divergent-barrier", named->line, "deadlock: it %s%s",
             doing(*named).c_str(), others.c_str());
}

// Runs resident blocks until all their threads have exited or one faults.
void run_blocks(std::vector<Block>& blocks) {
    std::vector<std::pair<Block*, u32>> order;
    size_t left = 0;
    for (Block& block : blocks)
        for (u32 i = 0; i < block.threads.size(); ++i) order.emplace_back(&block, i);
    left = order.size();
    while (left && !run.faulted) {
        if (run.launch->seed) std::shuffle(order.begin(), order.end(), run.random);
        bool progress = false;
        for (const auto& [block, index] : order) {
            if (block->states[index] != State::kReady) continue;
            progress = true;
            switch_to_thread(block->threads[index]);
            if (run.faulted) return;
            left -= block->states[index] == State::kExited;
        }
        for (Block& block : blocks)
            if (block.at_active_mask) {
                const u32 before = block.at_active_mask;
                for (Warp& warp : block.warps) resolve_active_masks(block, warp);
                progress |= block.at_active_mask != before;
            }
        if (!progress) return report_deadlock(blocks);
    }
}

void run_grid() {
    const EmuLaunch& launch = *run.launch;
    const u32 total = launch.grid[0] * launch.grid[1] * launch.grid[2];
    const u32 size = launch.block[0] * launch.block[1] * launch.block[2];
    std::vector<u32> numbers(total);
    for (u32 i = 0; i < total; ++i) numbers[i] = i;
    if (launch.seed) std::shuffle(numbers.begin(), numbers.end(), run.random);
    static std::vector<Block> blocks;
    blocks.resize(launch.cooperative ? total : 1);
    for (u32 done = 0; done < total && !run.faulted; done += blocks.size()) {
        for (size_t i = 0; i < blocks.size(); ++i)
            start_block(blocks[i], numbers[done + i], done + i, total, i * size);
        run_blocks(blocks);
        for (Block& block : blocks) finish_block(block);
    }
    tsan::acquire_all();
    stacks.trim();
}

}  // namespace

// ---- what translated code calls ----
Context* self = nullptr;
u32* cp_async_live = nullptr;
bool preempting = false;
bool duplicate_stores = false;

void fault(const char* kind, u32 line, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    record_fault(run.running, kind, line, format, arguments);
    va_end(arguments);
    tsan::release_all();  // the record is read when the launch is over
    switch_to_scheduler();
    std::abort();  // never resumed
}

void exit_thread() {
    Thread& thread = *run.running;
    Block& block = *thread.block;
    if (block.exited++ == 0) block.first_exited = thread.index;
    block.states[thread.index] = State::kExited;
    for (u32 id = 0; id < kBarriers; ++id) {
        const Barrier& barrier = block.barriers[id];
        if (!barrier.arrived || !barrier.whole) continue;
        for (const Thread& other : block.threads)
            if (block.states[other.index] == State::kBarrier && other.barrier == id) {
                fault_of(other, "divergent-barrier", other.line,
                         "it waits at barrier %u for all %zu threads of the block, but %s has exited", id,
                         block.threads.size(), where(thread).c_str());
                break;
            }
    }
    recheck_warp(block.warps[thread.context.warp], block);
    tsan::release_all();
    switch_to_scheduler();
    std::abort();  // never resumed
}

void loop_tick(u32 line) {
    if (--run.ticks) return;
    run.ticks = kTicks;
    if (std::chrono::steady_clock::now() > run.deadline)
        fault("timeout", line, "the launch is still running after %g s; this thread is in a loop",
              run.launch->timeout);
    switch_to_scheduler();
}

void preempt(u32) {
    if (run.random() % 4 == 0) switch_to_scheduler();
}

BarrierResult barrier(u32 line, u32 id, u32 threads, bool aligned, bool wait, bool predicate) {
    Thread& thread = *run.running;
    Block& block = *thread.block;
    if (id >= kBarriers) fault("barrier", line, "barrier %u: there are 16", id);
    if (threads % 32 != 0)
        fault("barrier", line, "barrier %u for %u threads: not a multiple of 32", id, threads);
    const bool whole = threads == 0;
    if (whole) threads = static_cast<u32>(block.threads.size());
    if (threads > (block.threads.size() + 31) / 32 * 32)
        fault("barrier", line, "barrier %u for %u threads in a block of %zu", id, threads,
              block.threads.size());
    if (whole && block.exited)
        fault("divergent-barrier", line,
              "it waits at barrier %u for all %zu threads of the block, but %s has exited", id,
              block.threads.size(), where(block.threads[block.first_exited]).c_str());
    Barrier& barrier = block.barriers[id];
    if (barrier.arrived == 0) {
        barrier.expected = threads;
        barrier.whole = whole;
        barrier.line = line;
        barrier.votes = 0;
    } else if (barrier.expected != threads) {
        fault("divergent-barrier", line, "barrier %u for %u threads, but others wait at it for %u (line %u)",
              id, threads, barrier.expected, barrier.line);
    } else if (whole && aligned && barrier.line != line) {
        fault("divergent-barrier", line, "threads of the block wait at barrier %u in another place (line %u)",
              id, barrier.line);
    }
    char* sync = block.clocks + 2 * id + (barrier.generation & 1);
    tsan::release(sync);
    barrier.votes += predicate;
    if (++barrier.arrived < barrier.expected) {
        if (!wait) return {};
        thread.barrier = id;
        wait_as(State::kBarrier, line);
    } else {
        thread.barrier_result = {barrier.votes, barrier.expected};
        barrier.arrived = 0;
        ++barrier.generation;
        for (Thread& other : block.threads) {
            if (block.states[other.index] != State::kBarrier || other.barrier != id) continue;
            other.barrier_result = thread.barrier_result;
            block.states[other.index] = State::kReady;
        }
    }
    if (wait) tsan::acquire(sync);
    return thread.barrier_result;
}

void rendezvous(u32 line, const char* kind, u32 mask, void* operand, Combine combine, bool absent_allowed,
                bool any_line, bool synchronizes) {
    Thread& thread = *run.running;
    Block& block = *thread.block;
    Warp& warp = block.warps[thread.context.warp];
    if (!(mask >> thread.context.lane & 1))
        fault("absent-lane", line, "lane %u executes %s with mask %#010x, which does not name it",
              thread.context.lane, kind, mask);
    thread.mask = mask;
    thread.kind = kind;
    thread.operand = operand;
    thread.combine = combine;
    thread.absent_allowed = absent_allowed;
    thread.any_line = any_line;
    thread.line = line;
    if (synchronizes) {  // lanes of one meeting share a slot
        thread.sync_slot = ~0u;
        for (const Thread* other : warp.lanes)
            if (other && other != &thread && block.states[other->index] == State::kLanes &&
                same_operation(thread, *other))
                thread.sync_slot = other->sync_slot;
        if (thread.sync_slot == ~0u)
            thread.sync_slot = 2 * kBarriers + thread.context.warp * kMeetings + warp.next_slot++ % kMeetings;
        tsan::release(block.clocks + thread.sync_slot);
    }
    block.states[thread.index] = State::kLanes;
    if (!complete_lanes(thread)) switch_to_scheduler();
    if (synchronizes) tsan::acquire(block.clocks + thread.sync_slot);
}

u32 active_mask(u32 line) {
    Thread& thread = *run.running;
    ++thread.block->at_active_mask;
    wait_as(State::kActiveMask, line);
    return thread.mask;
}

// ---- checks of memory ----
bool is_local(u64 address) {
    for (const LocalFrame* frame = self->frames; frame; frame = frame->outer)
        if (address - frame->lo < frame->size) return true;
    return false;
}

bool is_shared(u64 address) { return address - reinterpret_cast<u64>(self->shared) < self->total_smem; }

namespace {

const char* const kAccessNames[] = {"reads", "writes", "updates"};

// The buffer that holds [address, address + size), or the one that the address is nearest to.
struct Nearest {
    bool inside = false;
    bool cacheable = true;
    u64 lo = 0, bytes = 0;
    const char* name = nullptr;
    u64 distance = ~u64{0};

    void consider(u64 address, u64 size, u64 start, u64 length, const char* label, bool keep) {
        if (inside) return;
        inside = address >= start && size <= length && address - start <= length - size;
        const u64 gap = address < start            ? start - address
                        : address - start < length ? 0
                                                   : address - (start + length);
        if (!inside && gap >= distance) return;
        lo = start, bytes = length, name = label, distance = gap, cacheable = keep;
    }
};

[[noreturn]] void out_of_bounds(const Site& site, u64 address, u32 size, const Nearest& near, Access access) {
    const char* verb = kAccessNames[static_cast<int>(access)];
    const u64 end = near.lo + near.bytes;
    if (!near.name || near.distance > (1u << 20))
        fault("out-of-bounds", site.line, "%s %u bytes at %#llx, which is in no buffer of the launch", verb,
              size, static_cast<unsigned long long>(address));
    if (address < near.lo)
        fault("out-of-bounds", site.line, "%s %u bytes, %llu bytes before the start of %s (%llu bytes)", verb,
              size, static_cast<unsigned long long>(near.lo - address), near.name,
              static_cast<unsigned long long>(near.bytes));
    fault("out-of-bounds", site.line,
          "%s %u bytes at offset %llu of %s, %llu bytes past its end (%llu bytes)", verb, size,
          static_cast<unsigned long long>(address - near.lo), near.name,
          static_cast<unsigned long long>(address + size - end), static_cast<unsigned long long>(near.bytes));
}

}  // namespace

void check_slow(Site& site, u64 address, u32 size, Space space, Access access) {
    if (space == Space::kShared) address = static_cast<u32>(address);
    if (address % size != 0)
        fault("misaligned", site.line, "%s %u bytes at %#llx, which is not a multiple of %u",
              kAccessNames[static_cast<int>(access)], size, static_cast<unsigned long long>(address), size);
    Nearest near;
    const bool generic = space == Space::kGeneric;
    if (space == Space::kShared || generic) {
        const u64 base = generic ? reinterpret_cast<u64>(self->shared) : kSharedStart;
        each_shared([&](const char* name, u32 offset, u32 bytes) {
            near.consider(address, size, base + offset, bytes, name, !generic);
        });
    }
    if (space == Space::kLocal || generic)
        for (const LocalFrame* frame = self->frames; frame; frame = frame->outer)
            near.consider(address, size, frame->lo, frame->size, "local memory", false);
    if (space == Space::kGlobal || generic || space == Space::kParam) {
        for (const Buffer& buffer : buffers)
            near.consider(address, size, buffer.lo, buffer.size, buffer.name.c_str(), true);
        for (u32 i = 0; i < module.num_variables; ++i) {
            const Variable& variable = module.variables[i];
            near.consider(address, size, variable.address, variable.size, variable.name, true);
        }
        near.consider(address, size, reinterpret_cast<u64>(run.params), run.kernel->param_bytes,
                      "the parameters", true);
        if (run.launch->cooperative)
            near.consider(address, size, reinterpret_cast<u64>(run.grid_workspace), sizeof run.grid_workspace,
                          "the grid's workspace", true);
    }
    if (!near.inside) out_of_bounds(site, address, size, near, access);
    if (!near.cacheable) return;
    site.lo = near.lo;
    site.count = near.bytes - size + 1;
}

void check_in_flight(u32 line, u32 offset, u32 size, Access access) {
    const std::vector<u8>& marks = run.running->block->in_flight;
    const u32 start = offset - kSharedStart;
    for (u32 word = start / 4; word <= (start + size - 1) / 4 && word < marks.size(); ++word)
        if (marks[word])
            fault("cp.async", line,
                  "%s %u bytes of shared memory at offset %u, where a cp.async is still in flight",
                  kAccessNames[static_cast<int>(access)], size, start);
}

bool is_duplicate(u32 line, u64 shared, u32 size, u64 bits) {
    Block& block = *run.running->block;
    const u64 start = shared - reinterpret_cast<u64>(block.shared);
    const u64 mark = (block.barriers[0].generation + u64{1}) << 32 | line;
    bool stored = true;
    for (u32 i = 0; i < size; ++i) {  // no memcmp: TSan would take it for this thread's reading
        stored &=
            block.stored[start + i] == mark && block.shared[start + i] == static_cast<u8>(bits >> 8 * i);
        block.stored[start + i] = mark;
    }
    return stored;
}

// ---- cp.async ----
namespace {
void mark(Block& block, const Copy& copy, u8 value) {
    for (u32 i = 0; i < copy.size / 4; ++i) block.in_flight[(copy.shared - kSharedStart) / 4 + i] = value;
}
}  // namespace

void cp_async_issue(const Copy& copy) {
    Thread& thread = *run.running;
    tsan::as_scheduler([&] { return thread.copies.push_back(copy), 0; });
    mark(*thread.block, copy, 1);
    ++thread.block->copies_in_flight;
}

void cp_async_commit() {
    Thread& thread = *run.running;
    tsan::as_scheduler([&] { return thread.group_ends.push_back(thread.copies.size()), 0; });
}

u32 cp_async_due(u32 pending) {
    Thread& thread = *run.running;
    return tsan::as_scheduler([&] {
        size_t count = 0;
        if (pending == kAll) {
            count = thread.copies.size();
            thread.group_ends.clear();
        } else if (thread.group_ends.size() > pending) {
            const size_t groups = thread.group_ends.size() - pending;
            count = thread.group_ends[groups - 1];
            thread.group_ends.erase(thread.group_ends.begin(), thread.group_ends.begin() + groups);
            for (size_t& end : thread.group_ends) end -= count;
        }
        thread.due.assign(thread.copies.begin(), thread.copies.begin() + count);
        thread.copies.erase(thread.copies.begin(), thread.copies.begin() + count);
        return static_cast<u32>(count);
    });
}

Copy cp_async_take(u32 index) {
    Thread& thread = *run.running;
    const Copy copy = thread.due[index];
    mark(*thread.block, copy, 0);
    --thread.block->copies_in_flight;
    return copy;
}

// ---- local arrays ----
void push_frame(LocalFrame* frame) {
    frame->outer = self->frames;
    self->frames = frame;
}
void pop_frame(LocalFrame* frame) { self->frames = frame->outer; }

// ---- memory order ----
#if defined(EMU_TSAN)
void fence(u32 line, Scope scope) {
    if (preempting) preempt(line);
    tsan::fence(run.running->fences, scope == Scope::kGrid);
}
void before_atomic(u64 address, Order order, Scope scope, bool writes) {
    const bool release = order == Order::kRelease || order == Order::kAcqRel;
    if (writes)
        tsan::before_atomic(run.running->fences, run.running->tsan, run.running->block->clocks, address,
                            release, scope == Scope::kGrid);
}
void after_atomic(u64 address, Order order, Scope scope, bool) {
    const bool acquire = order == Order::kAcquire || order == Order::kAcqRel;
    tsan::after_atomic(run.running->fences, run.running->tsan, run.running->block->clocks, address, acquire,
                       scope == Scope::kGrid);
}
#else
void fence(u32 line, Scope) {
    if (preempting) preempt(line);
}
void before_atomic(u64, Order, Scope, bool) {}
void after_atomic(u64, Order, Scope, bool) {}
#endif

// ---- printf ----
int print(u32, u64 format, u64 arguments) {
    const char* at = reinterpret_cast<const char*>(format);
    const u8* next = reinterpret_cast<const u8*>(arguments);
    int count = 0;
    auto take = [&](size_t size) {
        next = reinterpret_cast<const u8*>((reinterpret_cast<u64>(next) + size - 1) / size * size);
        u64 value = 0;
        std::memcpy(&value, next, size);
        next += size;
        return value;
    };
    while (*at) {
        if (*at != '%' || at[1] == '%') {
            std::putchar(*at);
            at += *at == '%' ? 2 : 1;
            continue;
        }
        const size_t length = std::strcspn(at + 1, "diouxXeEfFgGaAcsp") + 2;
        const std::string spec(at, length);
        at += length;
        ++count;
        const char kind = spec.back();
        if (std::strchr("eEfFgGaA", kind)) {
            const u64 bits = take(8);
            double value;
            std::memcpy(&value, &bits, 8);
            std::printf(spec.c_str(), value);
        } else if (kind == 's') {
            std::printf(spec.c_str(), reinterpret_cast<const char*>(take(8)));
        } else if (kind == 'p' || spec.find('l') != std::string::npos) {
            std::printf(spec.c_str(), take(8));
        } else {
            std::printf(spec.c_str(), static_cast<u32>(take(4)));
        }
    }
    std::fflush(stdout);
    return count;
}

}  // namespace emu

using namespace emu;

#if defined(EMU_ASAN)
void __asan_on_error() {
    if (!run.running) return;
    const Dim3 b = run.running->context.ctaid, t = run.running->context.tid;
    std::fprintf(stderr, "running: block (%u,%u,%u) thread (%u,%u,%u)\n", b.x, b.y, b.z, t.x, t.y, t.z);
}
#endif

void emu_add_buffer(uint64_t address, uint64_t size, const char* name) {
    buffers.push_back({address, size, name});
}
void emu_clear_buffers() { buffers.clear(); }

uint64_t emu_variable(const char* name, uint64_t* size) {
    for (u32 i = 0; i < module.num_variables; ++i) {
        if (std::strcmp(module.variables[i].name, name) != 0) continue;
        *size = module.variables[i].size;
        return module.variables[i].address;
    }
    return 0;
}

int emu_launch(const char* kernel, const EmuLaunch* launch, const uint8_t* params, uint32_t param_bytes,
               EmuFault* fault) {
    static bool initialized = false;
    if (!initialized && module.initialize) module.initialize();
    initialized = true;
    std::memset(fault, 0, sizeof *fault);
    run.kernel = std::find_if(module.kernels, module.kernels + module.num_kernels,
                              [&](const Kernel& k) { return std::strcmp(k.name, kernel) == 0; });
    run.launch = launch;
    run.fault = fault;
    run.faulted = false;
    run.running = nullptr;
    run.random.seed(launch->seed);
    run.deadline =
        std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                               std::chrono::duration<double>(launch->timeout));
    std::vector<u64> aligned((param_bytes + 15) / 8);  // parameters may be read in words
    std::memcpy(aligned.data(), params, param_bytes);
    run.params = reinterpret_cast<const u8*>(aligned.data());
    run.grid_workspace[0] = run.grid_workspace[1] = 0;
    preempting = launch->seed != 0;
    duplicate_stores = launch->duplicate_stores != 0;
    for (u32 i = 0; i < module.num_sites; ++i) module.sites[i].count = 0;
    tsan::begin();
    run_grid();
    tsan::end();
    return run.faulted;
}
