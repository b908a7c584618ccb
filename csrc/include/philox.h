// Philox4x32-10: random bits as a pure function of a key and a counter.
//
// Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section 3.3.
#pragma once

#include <cstdint>

#include "isa.h"

namespace tts {

struct PhiloxCounter {
    uint32_t v[4];
};

struct PhiloxKey {
    uint32_t v[2];
};

}  // namespace tts

TTS_BEGIN_ISA

TTS_HD inline PhiloxCounter philox4x32(PhiloxCounter x, PhiloxKey key, int rounds = 10) {
    for (int i = 0; i < rounds; ++i) {
        const uint64_t a = uint64_t{0xD2511F53u} * x.v[0], b = uint64_t{0xCD9E8D57u} * x.v[2];
        x = {{static_cast<uint32_t>(b >> 32) ^ x.v[1] ^ key.v[0], static_cast<uint32_t>(b),
              static_cast<uint32_t>(a >> 32) ^ x.v[3] ^ key.v[1], static_cast<uint32_t>(a)}};
        key.v[0] += 0x9E3779B9u;
        key.v[1] += 0xBB67AE85u;
    }
    return x;
}

// The 64 bits of draw number `offset` of stream `seed`: words 1 and 0 of the block whose counter is the
// offset.
TTS_HD inline uint64_t philox_draw(int64_t seed, int64_t offset) {
    const uint64_t key = static_cast<uint64_t>(seed), counter = static_cast<uint64_t>(offset);
    const PhiloxCounter block =
        philox4x32({{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0}},
                   {{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)}});
    return uint64_t{block.v[1]} << 32 | block.v[0];
}

TTS_END_ISA
