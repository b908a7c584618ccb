// Executes AMX's instructions in software when a processor without AMX meets them: the handler of SIGILL
// decodes them, and amx_shim.h does what they do. So kernels run as they were compiled, with the registers
// that the compiler chose.
//
// Decoded are those that csrc/include/amx_tiles.h uses, in 64-bit mode (Software Developer's Manual, volume
// 2). What the processor refuses is not executed either: a product of tiles whose shapes do not fit, a tile
// that is not configured. Such an instruction and any other goes to the handler that was there before.
//
// A handler may interrupt any code, so nothing here allocates or locks. The tiles are thread_local; a shared
// library is compiled with -ftls-model=initial-exec, since the first use of other models allocates.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include "amx_shim.h"

namespace amx_by_sigill {

// An instruction C4 [~R ~X ~B map:5] [W ~vvvv L pp:2] opcode modrm [sib] [disp].
struct Instruction {
    uint8_t prefix, opcode;                // prefix: 0 none, 1 66, 2 F3, 3 F2
    int reg, rm, vvvv;                     // registers; rm where there is no memory operand
    bool memory = false, has_sib = false;  // [base + index * scale + disp]
    uint64_t base = 0, index = 0;          // the address without the index; the index times its scale
    const uint8_t* end = nullptr;
};

enum Prefix : uint8_t { kNone, k66, kF3, kF2 };

inline uint64_t value_of(const ucontext_t& context, int number) {
    constexpr int kPlace[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<uint64_t>(context.uc_mcontext.gregs[kPlace[number]]);
}

template <class T>
uint64_t take_displacement(const uint8_t*& at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    at += sizeof value;
    return static_cast<uint64_t>(static_cast<int64_t>(value));
}

// Decodes the memory operand after ModRM. `mode`: its upper two bits.
inline void decode_memory(const ucontext_t& context, int mode, int rm, bool high_index, bool high_base,
                          const uint8_t*& at, Instruction& found) {
    constexpr int kSib = 4, kNoIndex = 4, kNoBase = 5;
    int base = rm;
    found.has_sib = rm == kSib;
    if (found.has_sib) {
        const uint8_t sib = *at++;
        const int index = (sib >> 3 & 7) | (high_index ? 8 : 0);
        if (index != kNoIndex) found.index = value_of(context, index) << (sib >> 6);
        base = sib & 7;
    }
    if (mode == 0 && base == kNoBase) {  // a displacement alone; without SIB from the next instruction on
        found.base = take_displacement<int32_t>(at);
        if (!found.has_sib) found.base += reinterpret_cast<uint64_t>(at);
        return;
    }
    found.base = value_of(context, base | (high_base ? 8 : 0));
    if (mode == 1) found.base += take_displacement<int8_t>(at);
    if (mode == 2) found.base += take_displacement<int32_t>(at);
}

// Decodes what AMX's instructions have in common: VEX.128, W0, map 0F38. False: it is none of them.
inline bool decode(const ucontext_t& context, Instruction& found) {
    const auto* at = reinterpret_cast<const uint8_t*>(context.uc_mcontext.gregs[REG_RIP]);
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || at[2] & 0x84) return false;
    const uint8_t inverted = static_cast<uint8_t>(~at[1]);
    const bool high_reg = inverted & 0x80, high_index = inverted & 0x40, high_base = inverted & 0x20;
    found.prefix = at[2] & 3;
    found.vvvv = ~at[2] >> 3 & 15;
    found.opcode = at[3];
    const uint8_t modrm = at[4];
    found.reg = (modrm >> 3 & 7) | (high_reg ? 8 : 0);
    found.rm = modrm & 7;
    found.memory = modrm >> 6 != 3;
    at += 5;
    if (found.memory) {
        decode_memory(context, modrm >> 6, found.rm, high_index, high_base, at, found);
    } else {
        found.rm |= high_base ? 8 : 0;
    }
    found.end = at;
    return true;
}

inline bool configured(int t) {
    const amx_shim::State& s = amx_shim::state();
    return t < 8 && s.config[0] == 1 && s.rows(t) && s.bytes(t);
}

inline bool product_fits(int to, int a, int b) {
    const amx_shim::State& s = amx_shim::state();
    return configured(to) && configured(a) && configured(b) && to != a && to != b && a != b &&
           s.rows(to) == s.rows(a) && s.bytes(to) == s.bytes(b) && s.bytes(a) == 4 * s.rows(b) &&
           s.bytes(to) % 4 == 0;
}

// A configuration that the processor takes: palette 1, tiles of up to 16 rows of 64 bytes.
inline bool valid(const uint8_t* config) {
    bool good = config[0] == 1;
    for (int t = 0; t < 8; ++t)
        good = good && config[16 + 2 * t] <= 64 && !config[17 + 2 * t] && config[48 + t] <= 16;
    return good;
}

// Executes an instruction; false: it is not one of AMX's, or the processor would refuse it.
inline bool execute(const Instruction& it) {
    auto* memory = reinterpret_cast<uint8_t*>(it.base);
    const auto stride = static_cast<int64_t>(it.index);
    const bool rows = it.memory && it.has_sib && it.vvvv == 0 && configured(it.reg);
    if (it.opcode == 0x49 && it.vvvv == 0) {
        if (it.prefix == kNone && it.memory && it.reg == 0 && valid(memory + it.index)) {
            amx_shim::load_config(memory + it.index);
            return true;
        }
        if (it.prefix == kNone && !it.memory && it.reg == 0 && it.rm == 0) return amx_shim::release(), true;
        if (it.prefix == kF2 && !it.memory && configured(it.reg)) return amx_shim::zero(it.reg), true;
    }
    if (it.opcode == 0x4b && it.prefix == kF2 && rows) return amx_shim::load(it.reg, memory, stride), true;
    if (it.opcode == 0x4b && it.prefix == kF3 && rows) return amx_shim::store(it.reg, memory, stride), true;
    if (it.memory || !product_fits(it.reg, it.rm, it.vvvv)) return false;
    if (it.opcode == 0x5c && it.prefix == kF3) return amx_shim::add_bfloat16(it.reg, it.rm, it.vvvv), true;
    if (it.opcode == 0x5e && it.prefix == kF3) return amx_shim::add_bytes(it.reg, it.rm, it.vvvv), true;
    return false;
}

inline struct sigaction& previous() {
    static struct sigaction action;
    return action;
}

inline void pass_on(int signal, siginfo_t* info, void* context) {
    const struct sigaction& other = previous();
    if (other.sa_flags & SA_SIGINFO) return other.sa_sigaction(signal, info, context);
    if (other.sa_handler != SIG_DFL && other.sa_handler != SIG_IGN) return other.sa_handler(signal);
    sigaction(signal, &other, nullptr);  // the instruction is met again, and the process ends as without us
}

inline void handle(int signal, siginfo_t* info, void* context) {
    auto& met = *static_cast<ucontext_t*>(context);
    Instruction found;
    if (!decode(met, found) || !execute(found)) return pass_on(signal, info, context);
    met.uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(found.end);
}

inline void install() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    sigaction(SIGILL, &action, &previous());
}

}  // namespace amx_by_sigill
