// Fibers: stacks to switch between. On x86-64 a switch is a dozen instructions; elsewhere ucontext does it.
#pragma once
#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(EMU_UCONTEXT)
#include <ucontext.h>
#endif

namespace emu {

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)

struct Fiber {
    void* stack_pointer;
};

// Saves the callee-saved registers on the running stack, its pointer in `from`, and takes up `to`.
extern "C" void emu_switch_stack(void** from, void* to);
asm(R"(
.text
.p2align 4
.globl emu_switch_stack
.type emu_switch_stack, @function
emu_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch_stack, .-emu_switch_stack
)");

inline void make_fiber(Fiber& fiber, void* stack, size_t size, void (*start)()) {
    // `start` finds the stack as a call would have left it: 16-byte aligned before its return address
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = nullptr;
    top[0] = reinterpret_cast<void*>(start);
    top -= 6;  // the registers that the first switch pops
    for (int i = 0; i < 6; ++i) top[i] = nullptr;
    fiber.stack_pointer = top;
}
inline void switch_fiber(Fiber& from, Fiber& to) { emu_switch_stack(&from.stack_pointer, to.stack_pointer); }

#else

struct Fiber {
    ucontext_t context;
};
inline void make_fiber(Fiber& fiber, void* stack, size_t size, void (*start)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = size;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
}
inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace emu
