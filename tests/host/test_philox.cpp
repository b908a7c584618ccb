// Known answers of Philox4x32-10 (Random123's kat_vectors).
#include <cstdio>

#include "philox.h"

namespace {

struct Known {
    tts::PhiloxCounter counter;
    tts::PhiloxKey key;
    tts::PhiloxCounter expected;
};

constexpr Known kKnown[] = {
    {{{0, 0, 0, 0}}, {{0, 0}}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
    {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
     {{0xffffffff, 0xffffffff}},
     {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
    {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
     {{0xa4093822, 0x299f31d0}},
     {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
};

}  // namespace

int main() {
    int wrong = 0;
    for (const Known& known : kKnown) {
        const tts::PhiloxCounter got = tts::philox4x32(known.counter, known.key);
        for (int i = 0; i < 4; ++i) wrong += got.v[i] != known.expected.v[i];
    }
    wrong += tts::philox_draw(0, 0) != 0xe169c58d6627e8d5u;
    std::printf("%d wrong words\n", wrong);
    return wrong != 0;
}
