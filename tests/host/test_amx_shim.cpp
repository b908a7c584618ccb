// The tiles in software against the instructions, bit by bit. Where the processor has no AMX, it is the
// handler of SIGILL that executes them: then this tests what the handler decodes, and what it leaves to
// others.
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <random>
#include <vector>

#include "amx_by_sigill.h"
#include "check.h"

namespace {

bool has_tiles() {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
    const uint32_t wanted = 1u << 22 | 1u << 24 | 1u << 25;  // BF16, TILE, INT8
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return (edx & wanted) == wanted && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct Case {
    alignas(64) uint8_t config[64] = {1};
    alignas(64) uint8_t sums[2][16][64] = {}, out[2][16][64] = {}, rows[16][64] = {}, weights[16][64] = {};

    Case(int num_rows, int steps, int columns) {
        const int bytes[] = {4 * columns, 4 * columns, 4 * steps, 4 * columns};
        const int lines[] = {num_rows, num_rows, num_rows, steps};
        for (int t = 0; t < 4; ++t) {
            config[16 + 2 * t] = static_cast<uint8_t>(bytes[t]);
            config[48 + t] = static_cast<uint8_t>(lines[t]);
        }
    }
};

__attribute__((target("amx-tile,amx-bf16,amx-int8"))) void by_instructions(Case& c) {
    _tile_loadconfig(c.config);
    _tile_loadd(0, c.sums[0], 64);
    _tile_loadd(1, c.sums[1], 64);
    _tile_loadd(2, c.rows, 64);
    _tile_loadd(3, c.weights, 64);
    _tile_dpbf16ps(0, 2, 3);
    _tile_dpbsud(1, 2, 3);
    _tile_stored(0, c.out[0], 64);
    _tile_stored(1, c.out[1], 64);
    _tile_release();
}

void in_software(Case& c) {
    amx_shim::load_config(c.config);
    amx_shim::load(0, c.sums[0], 64);
    amx_shim::load(1, c.sums[1], 64);
    amx_shim::load(2, c.rows, 64);
    amx_shim::load(3, c.weights, 64);
    amx_shim::add_bfloat16(0, 2, 3);
    amx_shim::add_bytes(1, 2, 3);
    amx_shim::store(0, c.out[0], 64);
    amx_shim::store(1, c.out[1], 64);
    amx_shim::release();
}

// A NaN's payload is the processor's affair.
bool same(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b); }

using Random = std::mt19937;

// Numbers of one size, of all sizes, with subnormal results and operands, or any bits at all.
float number(Random& random, int kind) {
    std::normal_distribution<float> normal;
    const int exponent = static_cast<int>(random() % 120) - 60;
    if (kind == 0) return normal(random);
    if (kind == 1) return std::ldexp(normal(random), exponent);
    if (kind == 2) return std::ldexp(normal(random), exponent / 4 - 63);
    const auto bits = static_cast<uint32_t>(random());
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

void fill(Case& c, Random& random, int kind) {
    for (int i = 0; i < 512; ++i) {
        for (uint8_t* tile : {c.rows[0], c.weights[0]}) {
            const float x = number(random, kind);
            std::memcpy(tile + 2 * i, reinterpret_cast<const char*>(&x) + 2, 2);
        }
    }
    for (int i = 0; i < 256; ++i) {
        const float x = kind == 2 ? std::ldexp(number(random, 0), -126) : number(random, kind);
        const auto bits = static_cast<uint32_t>(random());
        std::memcpy(c.sums[0][0] + 4 * i, &x, 4);
        std::memcpy(c.sums[1][0] + 4 * i, &bits, 4);
    }
}

void test_instructions() {
    Random random(0);
    for (int i = 0; i < 4000; ++i) {
        const auto upto = [&](uint32_t most) { return 1 + static_cast<int>(random() % most); };
        Case hard(upto(16), upto(16), upto(16));
        fill(hard, random, i % 4);
        Case soft = hard;
        by_instructions(hard);
        in_software(soft);
        for (int at = 0; at < 256; ++at) {
            float x, y;
            std::memcpy(&x, hard.out[0][0] + 4 * at, 4);
            std::memcpy(&y, soft.out[0][0] + 4 * at, 4);
            CHECK(same(x, y));
        }
        CHECK(std::memcmp(hard.out[1], soft.out[1], sizeof hard.out[1]) == 0);
    }
}

// Where a tile of 7 lines of 12 bytes is loaded and stored, from the middle of two areas of memory.
struct Move {
    int64_t from, from_stride, to, to_stride;
};

struct Areas {
    static constexpr int kLines = 7, kColumns = 3;
    std::vector<uint8_t> in = std::vector<uint8_t>(1 << 19), out = in;
    Case tiles{kLines, 1, kColumns};

    Areas() {
        Random random(1);
        for (uint8_t& byte : in) byte = static_cast<uint8_t>(random());
    }
    // True if it was done; clears the memory for the next one.
    bool done(const Move& move) {
        std::vector<uint8_t> expected(out.size());
        const auto middle = static_cast<int64_t>(out.size() / 2);
        for (int64_t r = 0; r < kLines; ++r) {
            std::memcpy(&expected[static_cast<size_t>(middle + move.to + r * move.to_stride)],
                        &in[static_cast<size_t>(middle + move.from + r * move.from_stride)], 4 * kColumns);
        }
        const bool same = out == expected;
        out.assign(out.size(), 0);
        return same;
    }
};

// Executes three instructions, whose operands are %[config], %[from] and %[to] and the registers that are
// named.
#define TTS_MOVE(areas, configure, load, store)                                                   \
    __asm__ volatile(configure "\n" load "\n" store "\n tilerelease"                              \
                     :                                                                            \
                     : [config] "r"(areas.tiles.config), [from] "r"(areas.in.data() + (1 << 18)), \
                       [to] "r"(areas.out.data() + (1 << 18)), [here] "m"(areas.tiles.config)     \
                     : "memory", "cc", "rax", "rcx", "rsi", "r8", "r9", "r12", "r13")

// Each way to give an address, with registers of both halves of the sixteen.
void test_addresses() {
    Areas areas;
    TTS_MOVE(areas, "ldtilecfg %[here]",  //
             "mov %[from], %%rax; mov $12, %%rcx; tileloadd (%%rax,%%rcx,1), %%tmm0",
             "mov %[to], %%r8; mov $32, %%r9; tilestored %%tmm0, (%%r8,%%r9,2)");
    CHECK(areas.done({0, 12, 0, 64}));
    // A displacement of 8 bits, one of 32; r12 may be an index, though rsp with the same lower bits is none.
    TTS_MOVE(areas, "mov $8, %%rcx; ldtilecfg -64(%[config],%%rcx,8)",
             "mov %[from], %%r13; mov $-25, %%r12; tileloadd -128(%%r13,%%r12,4), %%tmm1",
             "mov %[to], %%rsi; mov $100, %%r12; tilestored %%tmm1, 0x12345(%%rsi,%%r12,8)");
    CHECK(areas.done({-128, -100, 0x12345, 800}));
    // As a base r12 needs a SIB byte and r13 a displacement. An address without a base.
    TTS_MOVE(areas, "mov %[config], %%rcx; shr $3, %%rcx; ldtilecfg 0(,%%rcx,8)",
             "mov %[from], %%r12; mov $77, %%r13; tileloadd -0x8765(%%r12,%%r13,1), %%tmm0",
             "mov %[to], %%r13; mov $-12, %%rcx; tilestored %%tmm0, (%%r13,%%rcx,1)");
    CHECK(areas.done({-0x8765, 77, 0, -12}));
    // Without an index all lines are at one place.
    TTS_MOVE(areas, "mov %[config], %%r12; ldtilecfg (%%r12)", "mov %[from], %%r9; tileloadd 5(%%r9), %%tmm0",
             "mov %[to], %%rsi; mov $16, %%rax; tilestored %%tmm0, 127(%%rsi,%%rax,1)");
    CHECK(areas.done({5, 0, 127, 16}));
    // A place relative to the instruction.
    alignas(64) static uint8_t config[64];
    std::memcpy(config, areas.tiles.config, sizeof config);
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
    TTS_MOVE(areas, "", "mov %[from], %%rax; mov $1, %%rcx; tileloadd (%%rax,%%rcx,1), %%tmm0",
             "mov %[to], %%rax; mov $12, %%rcx; tilezero %%tmm1; tilestored %%tmm0, (%%rax,%%rcx,1)");
    CHECK(areas.done({0, 1, 0, 12}));
}

volatile int passed_on = 0, length_of_next = 0;

void skip(int, siginfo_t*, void* context) {
    passed_on = passed_on + 1;
    static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] += length_of_next;
}

__attribute__((target("amx-tile,amx-bf16,amx-int8"))) void test_what_is_refused() {
    length_of_next = 2;
    __asm__ volatile("ud2");
    CHECK(passed_on == 1);
    length_of_next = 5;
    _tile_dpbf16ps(0, 2, 3);  // without a configuration
    CHECK(passed_on == 2);
    const Case c(7, 5, 3);
    _tile_loadconfig(c.config);
    _tile_dpbf16ps(0, 3, 2);  // 7 lines of sums, 5 lines of rows
    CHECK(passed_on == 3);
    _tile_dpbsud(0, 2, 3);
    _tile_release();
    CHECK(passed_on == 3);
}

}  // namespace

int main() {
    std::printf("AMX by %s\n", has_tiles() ? "the processor" : "SIGILL");
    struct sigaction action = {};
    action.sa_sigaction = skip;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
    amx_by_sigill::install();
    test_instructions();
    test_addresses();
    test_what_is_refused();
}
#else
int main() {}
#endif
