// Chooses the best instruction set that the build has, the processor offers and the operating system saves.
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
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
#endif

namespace {

struct Level {
    const char* name;
    const Kernels* table;
    bool supported;
};

#if defined(TTS_HAS_X86_ISAS)

struct Cpuid {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    Cpuid(uint32_t leaf, uint32_t subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool bit(uint32_t word, int n) { return (word >> n) & 1u; }

// Which register state the operating system saves on a context switch.
uint32_t saved_state() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

struct Features {
    bool avx2 = false, avx512 = false, avx512_bf16 = false;
    Features() {
        const Cpuid basic(1, 0), extended(7, 0), more(7, 1);
        if (!bit(basic.ecx, 27)) return;  // no OSXSAVE: no xgetbv either
        const uint32_t state = saved_state();
        const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
        const bool fma = bit(basic.ecx, 12), f16c = bit(basic.ecx, 29);
        avx2 = ymm && fma && f16c && bit(extended.ebx, 5);
        avx512 = avx2 && zmm && bit(extended.ebx, 16) && bit(extended.ebx, 17) && bit(extended.ebx, 30) &&
                 bit(extended.ebx, 31);  // F, DQ, BW, VL
        avx512_bf16 = avx512 && bit(more.eax, 5);
    }
};

#endif

class Levels {
  public:
    Levels() {
#if defined(TTS_HAS_X86_ISAS)
        const Features cpu;
        levels_[3] = {"avx512_bf16", &avx512_bf16::kTable, cpu.avx512_bf16};
        levels_[2] = {"avx512", &avx512::kTable, cpu.avx512};
        levels_[1] = {"avx2", &avx2::kTable, cpu.avx2};
#endif
        for (const Level& level : levels_) {
            if (!level.supported) continue;
            chosen_ = &level;
            if (!supported_.empty()) supported_ += ',';
            supported_ += level.name;
        }
        if (const char* forced = std::getenv("TTS_KERNELS_CPU_ISA"); forced && *forced) force(forced);
    }

    const Level& chosen() const {
        if (!chosen_) throw std::runtime_error(error_);
        return *chosen_;
    }
    const std::string& supported() const { return supported_; }

  private:
    void force(const std::string& name) {
        chosen_ = nullptr;
        for (const Level& level : levels_) {
            if (level.supported && name == level.name) chosen_ = &level;
        }
        error_ = "TTS_KERNELS_CPU_ISA: expected one of " + supported_ + ", got " + name;
    }

    Level levels_[4] = {{"generic", &generic::kTable, true}, {}, {}, {}};
    const Level* chosen_ = nullptr;
    std::string supported_, error_;
};

const Levels& levels() {
    static const Levels instance;
    return instance;
}

}  // namespace

const Kernels& kernels() { return *levels().chosen().table; }
const char* isa_in_use() { return levels().chosen().name; }
const char* isa_supported() { return levels().supported().c_str(); }

}  // namespace tts
