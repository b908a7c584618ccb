// Chooses the fastest instruction set for this processor, among those that the build has, the processor
// supports and the operating system saves. The choice is by a table, never by a timing, because results of
// different sets differ in their last bits.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(TTS_HAS_X86_ISAS)
// True if AMX's instructions are executed in software. Nothing that is installed defines it: a test's library
// that is preloaded does (tests/host/amx_by_sigill.cpp), and so does the build for sanitizers.
extern "C" __attribute__((weak, visibility("default"))) bool tts_amx_in_software();
#endif

namespace tts {

#if defined(TTS_HAS_X86_ISAS)
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
namespace avx512_bf16 {
extern const Kernels kTable;
}

// These sets have their own kernels for a few operators, and use those of a smaller set for the others.
#define TTS_DECLARE(name) extern decltype(TTS_ISA::name) name;
namespace avx_vnni {
TTS_QUANTIZED_KERNELS(TTS_DECLARE)
}
namespace avx512_vnni {
TTS_QUANTIZED_KERNELS(TTS_DECLARE)
}
namespace amx {
TTS_AMX_KERNELS(TTS_DECLARE)
}
#undef TTS_DECLARE
#endif

namespace {

struct Level {
    const char* name;
    Kernels table;
    bool supported;
};

#if defined(TTS_HAS_X86_ISAS)

struct Cpuid {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    Cpuid(uint32_t leaf, uint32_t subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool bit(uint32_t word, int n) { return (word >> n) & 1u; }

// The register state that the operating system saves on a context switch.
uint32_t saved_state() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

// On Linux a process must ask before it may use tiles.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

struct Features {
    bool avx2 = false, avx_vnni = false, avx512 = false, avx512_vnni = false, avx512_bf16 = false,
         amx = false;
    Features() {
        const Cpuid basic(1, 0), extended(7, 0), more(7, 1);
        if (!bit(basic.ecx, 27)) return;  // no OSXSAVE: no xgetbv either
        const uint32_t state = saved_state();
        const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
        const bool fma = bit(basic.ecx, 12), f16c = bit(basic.ecx, 29);
        avx2 = ymm && fma && f16c && bit(extended.ebx, 5);
        avx512 = avx2 && zmm && bit(extended.ebx, 16) && bit(extended.ebx, 17) && bit(extended.ebx, 30) &&
                 bit(extended.ebx, 31);  // F, DQ, BW, VL
        avx_vnni = avx2 && bit(more.eax, 4);
        avx512_vnni = avx512 && bit(extended.ecx, 11);
        avx512_bf16 = avx512_vnni && bit(more.eax, 5);
        const bool tiles = (state & 0x60000) == 0x60000 && bit(extended.edx, 22) && bit(extended.edx, 24) &&
                           bit(extended.edx, 25) && may_use_tiles();  // BF16, TILE, INT8
        amx = avx512_bf16 && (tiles || (tts_amx_in_software && tts_amx_in_software()));
    }
};

// The vendor, and the family and model as in its manuals and in lscpu.
struct Processor {
    std::string vendor;
    uint32_t family = 0, model = 0;
    Processor() {
        const Cpuid name(0, 0), version(1, 0);
        for (const uint32_t word : {name.ebx, name.edx, name.ecx}) {
            vendor.append(reinterpret_cast<const char*>(&word), sizeof word);
        }
        family = (version.eax >> 8) & 0xf;
        model = (version.eax >> 4) & 0xf;
        if (family == 0xf || family == 6) model |= (version.eax >> 12) & 0xf0;
        if (family == 0xf) family += (version.eax >> 20) & 0xff;
    }
};

#endif

// The fastest level for a kind of processor. The first line that matches is used.
struct Fastest {
    const char* vendor;
    int family, model;  // -1: any model
    const char* level;  // or the best lower level that the processor has
    const char* why;    // the measurement
};

// A step is a decode step of SmolLM2-135M in bfloat16, with 64 branches on 512 shared tokens and two threads.
constexpr Fastest kFastest[] = {
    {"GenuineIntel", 6, 207, "avx512_vnni",
     "Emerald Rapids: vdpbf16ps does 45 G multiply-adds a second and core, fp32 89 G; a step takes 80 ms at "
     "avx512, 128 ms at avx512_bf16; whole numbers by VNNI"},
    {"GenuineIntel", 6, 167, "amx",
     "a Xeon with AMX that names itself model 167: a step takes 58 ms at amx, 139 ms at avx512, 162 ms at "
     "avx512_bf16"},
    {"GenuineIntel", -1, -1, "avx512_vnni",
     "not measured; on the Intel cores that were, vdpbf16ps runs at half of fp32's rate"},
    {"AuthenticAMD", 25, 1, "avx2",
     "Zen 3 has no AVX-512: SmolLM2's layers on 16 rows take 37 ms at avx2 and 293 ms at generic, in int8 31 "
     "and 565 ms"},
    {"AuthenticAMD", 25, -1, "avx512_bf16", "Zen 4: one vdpbf16ps a cycle, twice fp32's multiply-adds"},
    {"AuthenticAMD", 26, -1, "avx512_bf16", "Zen 5: bf16 products reach 433 GFLOP/s a core, fp32 235"},
    {"", -1, -1, "avx512_bf16", "not measured: the longest list of instructions but AMX's"},
};

class Levels {
  public:
    Levels() {
#if defined(TTS_HAS_X86_ISAS)
        const Features cpu;
        levels_[1] = {"avx2", avx2::kTable, cpu.avx2};
        levels_[2] = {"avx_vnni", avx2::kTable, cpu.avx_vnni};
        levels_[3] = {"avx512", avx512::kTable, cpu.avx512};
        levels_[4] = {"avx512_vnni", avx512::kTable, cpu.avx512_vnni};
        levels_[5] = {"avx512_bf16", avx512_bf16::kTable, cpu.avx512_bf16};
        levels_[6] = {"amx", avx512::kTable, cpu.amx};
#define TTS_OWN(name) levels_[2].table.name = &avx_vnni::name;
        TTS_QUANTIZED_KERNELS(TTS_OWN)
#undef TTS_OWN
#define TTS_OWN(name) levels_[4].table.name = &avx512_vnni::name;
        TTS_QUANTIZED_KERNELS(TTS_OWN)
#undef TTS_OWN
#define TTS_OWN(name) levels_[6].table.name = &amx::name;
        TTS_AMX_KERNELS(TTS_OWN)
#undef TTS_OWN
#endif
        for (const Level& level : levels_) {
            if (!level.supported) continue;
            if (!supported_.empty()) supported_ += ',';
            supported_ += level.name;
        }
        choose();
        if (const char* forced = std::getenv("TTS_KERNELS_CPU_ISA"); forced && *forced) force(forced);
    }

    const Level& chosen() const {
        if (!chosen_) throw std::runtime_error(error_);
        return *chosen_;
    }
    const std::string& supported() const { return supported_; }
    const std::string& reason() const { return reason_; }

  private:
    void choose() {
        const Fastest& line = fastest();
        for (const Level& level : levels_) {
            if (level.supported) chosen_ = &level;
            if (level.name && std::strcmp(level.name, line.level) == 0) break;
        }
        reason_ = line.why;
        if (std::strcmp(chosen_->name, line.level) != 0) {
            reason_ = std::string("the best that it has; ") + line.level + " would be: " + line.why;
        }
    }

    static const Fastest& fastest() {
        const Fastest* line = kFastest;
#if defined(TTS_HAS_X86_ISAS)
        const Processor cpu;
        const auto fits = [](int wanted, uint32_t is) {
            return wanted < 0 || wanted == static_cast<int>(is);
        };
        while (*line->vendor && !(cpu.vendor == line->vendor && fits(line->family, cpu.family) &&
                                  fits(line->model, cpu.model))) {
            ++line;
        }
#else
        while (*line->vendor) ++line;
#endif
        return *line;
    }

    void force(const std::string& name) {
        chosen_ = nullptr;
        reason_ = "TTS_KERNELS_CPU_ISA";
        for (const Level& level : levels_) {
            if (level.supported && name == level.name) chosen_ = &level;
        }
        error_ = "TTS_KERNELS_CPU_ISA: expected one of " + supported_ + ", got " + name;
    }

    Level levels_[7] = {{"generic", generic::kTable, true}, {}, {}, {}, {}, {}, {}};
    const Level* chosen_ = nullptr;
    std::string supported_, reason_, error_;
};

const Levels& levels() {
    static const Levels instance;
    return instance;
}

}  // namespace

const Kernels& kernels() { return levels().chosen().table; }
const char* isa_in_use() { return levels().chosen().name; }
const char* isa_supported() { return levels().supported().c_str(); }
const char* isa_reason() { return levels().reason().c_str(); }

}  // namespace tts
