// A program that includes this can make an allocation of its choice fail.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

inline int64_t allocations_left = -1;  // the one after them fails; -1: none does
inline bool allocation_failed = false;

// Replacements are not inline, so one file of a program includes this. Arrays too: a sanitizer has its own.
void* operator new(size_t size, const std::nothrow_t&) noexcept {
    if (allocations_left < 0 || allocations_left-- > 0) return std::malloc(size);
    allocation_failed = true;
    return nullptr;
}
void* operator new(size_t size) {
    if (void* memory = operator new(size, std::nothrow)) return memory;
    throw std::bad_alloc();
}
void* operator new[](size_t size) { return operator new(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
