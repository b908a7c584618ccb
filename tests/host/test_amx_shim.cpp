// The tiles in software against the processor's, bit by bit, where it has any.
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <random>

#include "amx_shim.h"
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

__attribute__((target("amx-tile,amx-bf16,amx-int8"))) void by_processor(Case& c) {
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

}  // namespace

int main() {
    if (!has_tiles()) return std::puts("no AMX here: not compared") < 0;
    Random random(0);
    for (int i = 0; i < 4000; ++i) {
        const auto upto = [&](uint32_t most) { return 1 + static_cast<int>(random() % most); };
        Case hard(upto(16), upto(16), upto(16));
        fill(hard, random, i % 4);
        Case soft = hard;
        by_processor(hard);
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
#else
int main() {}
#endif
