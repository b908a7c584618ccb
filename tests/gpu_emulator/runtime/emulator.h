// What a translated kernel calls. Everything here is compiled into the translated file, so that a sanitizer
// sees the kernel's memory accesses; scheduler.cpp, which implements the declarations at the end, is never
// instrumented.
#pragma once
#include <cstddef>
#include <cstdint>

// A function that touches the runtime's own data or a thread's private stack: no sanitizer looks at it. It is
// never inlined into an instrumented function, so its locals stay invisible too.
#if defined(EMU_TSAN)
#define EMU_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#define EMU_HIDDEN EMU_UNSEEN static
#else
#define EMU_UNSEEN
#define EMU_HIDDEN static inline
#endif
#define EMU_INLINE __attribute__((always_inline)) static inline

namespace emu {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

struct Dim3 {
    u32 x, y, z;
};

// Addresses of shared memory start here, so that 0 is no valid address; CUDA keeps as much for itself from
// sm_90 on.
constexpr u32 kSharedStart = 1024;

// Local arrays of one function call; the accesses of a thread are checked against its chain of frames.
struct LocalFrame;

// What the kernel may read of its thread.
struct Context {
    Dim3 tid, ctaid, ntid, nctaid;
    u32 lane, warp;
    u8* shared;  // host address of shared address kSharedStart
    u32 dynamic_smem, total_smem;
    u32 dynamic_shared;  // shared address of the dynamic part
    u64 grid_workspace;  // of cooperative launches, else 0
    const u8* param;     // the launch's parameters
    LocalFrame* frames;
    u64 result[8];  // of the last warp-wide operation with more than one result
};

extern Context* self;          // the running thread
extern u32* cp_async_live;     // copies in flight in the running thread's block
extern bool preempting;        // a seed asks for extra switches at strong memory operations
extern bool duplicate_stores;  // of the launch

enum class Space : u8 { kGlobal, kShared, kLocal, kParam, kGeneric };
enum class Order : u8 { kWeak, kRelaxed, kAcquire, kRelease, kAcqRel };
enum class Scope : u8 { kBlock, kGrid };
enum class Access : u8 { kRead, kWrite, kAtomic };

// One memory instruction: its line in the PTX, and the buffer that it last touched, which makes the usual
// bounds check one comparison. An access at `a` is inside if a - lo < count (count = bytes of the buffer -
// bytes accessed + 1).
struct Site {
    u64 lo, count;
    u32 line;
};

struct Variable {
    const char* name;
    u64 address, size;
};

// ---- scheduler.cpp ----
[[noreturn]] void fault(const char* kind, u32 line, const char* format, ...);
void check_slow(Site& site, u64 address, u32 size, Space space, Access access);
void check_in_flight(u32 line, u32 offset, u32 size, Access access);
// Whether that statement has put these bytes there since the last barrier; notes that it does now.
bool is_duplicate(u32 line, u64 shared, u32 size, u64 bits);
bool is_local(u64 address);
bool is_shared(u64 address);
void loop_tick(u32 line);  // at each backward branch: lets the others run now and then, and notices a hang
void preempt(u32 line);    // at strong memory operations: switches by the seed
[[noreturn]] void exit_thread();

struct BarrierResult {
    u32 count;  // threads of the barrier whose predicate held
    u32 total;  // threads of the barrier
};
BarrierResult barrier(u32 line, u32 id, u32 threads, bool aligned, bool wait, bool predicate);

// Waits until all lanes of `mask` have come with the same `kind` and mask (and line, unless `any_line`); the
// last one runs `combine` over the operands of all, then each goes on.
using Combine = void (*)(void* const* operands, u32 mask);
void rendezvous(u32 line, const char* kind, u32 mask, void* operand, Combine combine, bool absent_allowed,
                bool any_line, bool synchronizes);
u32 active_mask(u32 line);

void fence(u32 line, Scope scope);
void before_atomic(u64 address, Order order, Scope scope, bool writes);
void after_atomic(u64 address, Order order, Scope scope, bool reads);

struct Copy {  // a cp.async in flight
    u64 source;
    u32 shared, size, read;  // destination; bytes written; bytes read, the rest is zeros
    Site* site;
};
void cp_async_issue(const Copy& copy);
void cp_async_commit();
// Moves the copies that `pending` younger groups do not cover into a list; returns its length. kAll:
// uncommitted ones too.
constexpr u32 kAll = ~0u;
u32 cp_async_due(u32 pending);
Copy cp_async_take(u32 index);

int print(u32 line, u64 format, u64 arguments);
void push_frame(LocalFrame* frame);
void pop_frame(LocalFrame* frame);

struct LocalFrame {
    u64 lo, size;
    LocalFrame* outer;
};

// What scheduler.cpp needs to know of a translated module; translate.py writes one.
struct Kernel {
    const char* name;
    void (*entry)(const u8* params);
    u32 param_bytes;
    const Variable* shared;  // addresses are offsets from kSharedStart
    u32 num_shared;
    u32 dynamic_offset;  // of the dynamic shared memory, likewise
};
struct Module {
    const Kernel* kernels;
    u32 num_kernels;
    Site* sites;
    u32 num_sites;
    const Variable* variables;
    u32 num_variables;
    void (*initialize)();
};
extern const Module module;

}  // namespace emu
