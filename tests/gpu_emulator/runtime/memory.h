// Loads, stores, atomics and asynchronous copies of every state space.
#pragma once
#include <bit>
#include <cstring>

#include "emulator.h"

namespace emu {

template <class T, int N>
struct Vec {
    T x[N];
};

// The host address of `address` in `space`, after the checks of bounds and alignment. Under ASan the
// sanitizer judges bounds itself: there every buffer is an allocation of exactly its size.
template <Space S, Access A, u32 Bytes>
EMU_INLINE u64 locate(Site& site, u64 address) {
#if defined(EMU_ASAN)
    if (address % Bytes != 0) check_slow(site, address, Bytes, S, A);
#else
    if (__builtin_expect(address - site.lo >= site.count || address % Bytes != 0, 0))
        check_slow(site, address, Bytes, S, A);
#endif
    if constexpr (S == Space::kShared) {
        if (*cp_async_live) check_in_flight(site.line, static_cast<u32>(address), Bytes, A);
        return reinterpret_cast<u64>(self->shared) + (static_cast<u32>(address) - kSharedStart);
    }
    if constexpr (S == Space::kGeneric) {
        if (*cp_async_live && is_shared(address))
            check_in_flight(site.line,
                            static_cast<u32>(address - reinterpret_cast<u64>(self->shared)) + kSharedStart,
                            Bytes, A);
    }
    return address;
}

template <class T>
EMU_HIDDEN T read_private(u64 address) {
    T value;
    std::memcpy(&value, reinterpret_cast<const void*>(address), sizeof(T));
    return value;
}
template <class T>
EMU_HIDDEN void write_private(u64 address, T value) {
    std::memcpy(reinterpret_cast<void*>(address), &value, sizeof(T));
}

// Local memory and parameters are a thread's own: under TSan they are hidden, because stacks are used again.
template <class T, Space S>
EMU_INLINE T read_word(u64 address) {
#if defined(EMU_TSAN)
    if constexpr (S == Space::kLocal || S == Space::kParam) return read_private<T>(address);
    if constexpr (S == Space::kGeneric)
        if (is_local(address)) return read_private<T>(address);
#endif
    return *reinterpret_cast<const T*>(address);
}
template <class T, Space S>
EMU_INLINE void write_word(u64 address, T value) {
#if defined(EMU_TSAN)
    if constexpr (S == Space::kLocal || S == Space::kParam) return write_private<T>(address, value);
    if constexpr (S == Space::kGeneric)
        if (is_local(address)) return write_private<T>(address, value);
#endif
    *reinterpret_cast<T*>(address) = value;
}

template <class T, int N, Space S, Order O = Order::kWeak, Scope C = Scope::kGrid>
EMU_INLINE Vec<T, N> load_vector(Site& site, u64 address) {
    if (O != Order::kWeak && preempting) preempt(site.line);
    const u64 host = locate<S, Access::kRead, sizeof(T) * N>(site, address);
    Vec<T, N> value;
    for (int i = 0; i < N; ++i) {
        if constexpr (O == Order::kWeak) {
            value.x[i] = read_word<T, S>(host + i * sizeof(T));
        } else {
            value.x[i] = __atomic_load_n(reinterpret_cast<const T*>(host + i * sizeof(T)), __ATOMIC_RELAXED);
            after_atomic(host + i * sizeof(T), O, C, /*reads=*/true);
        }
    }
    return value;
}

template <class T>
EMU_INLINE u64 bits_of(T value) {
    if constexpr (sizeof(T) == 8) return std::bit_cast<u64>(value);
    if constexpr (sizeof(T) == 4) return std::bit_cast<u32>(value);
    if constexpr (sizeof(T) == 2) return std::bit_cast<u16>(value);
    if constexpr (sizeof(T) == 1) return std::bit_cast<u8>(value);
}

template <class T, int N, Space S, Order O = Order::kWeak, Scope C = Scope::kGrid>
EMU_INLINE void store_vector(Site& site, u64 address, Vec<T, N> value) {
    if (O != Order::kWeak && preempting) preempt(site.line);
    const u64 host = locate<S, Access::kWrite, sizeof(T) * N>(site, address);
    for (int i = 0; i < N; ++i) {
        if constexpr (O == Order::kWeak) {
#if defined(EMU_TSAN)
            if (S == Space::kShared && duplicate_stores &&
                is_duplicate(site.line, host + i * sizeof(T), sizeof(T), bits_of(value.x[i])))
                continue;
#endif
            write_word<T, S>(host + i * sizeof(T), value.x[i]);
        } else {
            before_atomic(host + i * sizeof(T), O, C, /*writes=*/true);
            __atomic_store_n(reinterpret_cast<T*>(host + i * sizeof(T)), value.x[i], __ATOMIC_RELAXED);
        }
    }
}

template <class T, Space S, Order O = Order::kWeak, Scope C = Scope::kGrid>
EMU_INLINE T load(Site& site, u64 address) {
    return load_vector<T, 1, S, O, C>(site, address).x[0];
}
template <class T, Space S, Order O = Order::kWeak, Scope C = Scope::kGrid>
EMU_INLINE void store(Site& site, u64 address, T value) {
    store_vector<T, 1, S, O, C>(site, address, Vec<T, 1>{{value}});
}

// A function's .param: an array on the caller's stack (or the launch's parameters), addressed by constants.
template <class T>
EMU_HIDDEN T load_param(const u8* address) {
    return read_private<T>(reinterpret_cast<u64>(address));
}
template <class T>
EMU_HIDDEN void store_param(u8* address, T value) {
    write_private<T>(reinterpret_cast<u64>(address), value);
}

// Replaces the word by op(old) and returns old; T is an unsigned word, Op works on it.
template <class T, Space S, Order O, Scope C, class Op>
EMU_INLINE T atomic(Site& site, u64 address, Op op) {
    if (preempting) preempt(site.line);
    const u64 host = locate<S, Access::kAtomic, sizeof(T)>(site, address);
    T* word = reinterpret_cast<T*>(host);
    before_atomic(host, O, C, /*writes=*/true);
    T old = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(word, &old, op(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    after_atomic(host, O, C, /*reads=*/true);
    return old;
}

// cp.async: from issue to wait the destination holds 0xFF and may be neither read nor written.
EMU_INLINE void fill_shared(u32 offset, u32 size, u32 pattern) {
    u32* words = reinterpret_cast<u32*>(self->shared + (offset - kSharedStart));
    for (u32 i = 0; i < size / 4; ++i) words[i] = pattern;
}

template <u32 Bytes>
EMU_INLINE void cp_async(Site& destination, Site& source, u32 shared, u64 global, u32 read) {
    locate<Space::kShared, Access::kWrite, Bytes>(destination, shared);
    if (read > Bytes)
        fault("cp.async", source.line, "the source size %u is above the copy's %u bytes", read, Bytes);
    if (read == Bytes) locate<Space::kGlobal, Access::kRead, Bytes>(source, global);
    fill_shared(shared, Bytes, ~0u);
    cp_async_issue(Copy{global, shared, Bytes, read, &source});
}

static void cp_async_wait(u32 pending) {
    const u32 due = cp_async_due(pending);
    for (u32 i = 0; i < due; ++i) {
        const Copy copy = cp_async_take(i);
        u8* target = self->shared + (copy.shared - kSharedStart);
        if (copy.read == copy.size) {
            for (u32 b = 0; b < copy.size; b += 4)
                *reinterpret_cast<u32*>(target + b) = *reinterpret_cast<const u32*>(copy.source + b);
        } else {
            for (u32 b = 0; b < copy.size; ++b) {
                if (b < copy.read) {
                    const u64 from = copy.source + b;
                    Site byte{0, 0, copy.site->line};
                    target[b] =
                        *reinterpret_cast<const u8*>(locate<Space::kGlobal, Access::kRead, 1>(byte, from));
                } else {
                    target[b] = 0;
                }
            }
        }
    }
}

// Generic addresses are host addresses; those of shared memory move by the window's start.
EMU_INLINE u64 shared_to_generic(u64 address) {
    return reinterpret_cast<u64>(self->shared) + static_cast<u32>(address) - kSharedStart;
}
EMU_INLINE u64 generic_to_shared(u64 address) {
    return static_cast<u32>(address - reinterpret_cast<u64>(self->shared) + kSharedStart);
}

// Registers a function's local arrays for as long as the call lasts.
class Frame {
  public:
    Frame(void* data, u64 size) : frame_{reinterpret_cast<u64>(data), size, nullptr} { push_frame(&frame_); }
    ~Frame() { pop_frame(&frame_); }
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;

  private:
    LocalFrame frame_;
};

}  // namespace emu
