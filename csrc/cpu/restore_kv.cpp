// restore_kv_: the keys and values of blocks of tokens, from few bits to their cache slots.
//
//   keys [B, Hkv D, bytes], values [B, tokens, bytes]  ->  k, v in the slots of n of the B blocks
//
// Keys are stored before their rotation, with a scale and a zero for each channel of a block. A channel's
// codes are next to each other, and a key needs one of each channel. So the codes of a head are transposed,
// as bytes, which are smaller than the numbers that they become. Numbers are rounded to the cache's type, and
// then rotated.
#include "restore_kv.h"

#include "quantized_kv.h"
#include "quantized_rows.h"
#include "rope.h"
#include "slots.h"
#include "vec.h"
#include "vec_row.h"

TTS_BEGIN_ISA

namespace {

constexpr int64_t kChannels = 64;  // transposed at once, so that the codes stay in L1

// Swaps the bits of `mask` in a with the bits `shift` above them in b.
inline void swap_bits(uint64_t& a, uint64_t& b, int shift, uint64_t mask) {
    const uint64_t differ = (a >> shift ^ b) & mask;
    b ^= differ, a ^= differ << shift;
}

// to[j][i] = from[i][j] for 8 x 8 bytes, in rows of so many bytes.
inline void transpose_8x8(const uint8_t* from, int64_t from_row, uint8_t* to, int64_t to_row) {
    uint64_t x[8];
    for (int i = 0; i < 8; ++i) __builtin_memcpy(&x[i], from + i * from_row, 8);
    constexpr uint64_t masks[] = {0, 0x00ff00ff00ff00ff, 0x0000ffff0000ffff, 0, 0x00000000ffffffff};
    for (int step = 1; step < 8; step *= 2) {
        for (int i = 0; i < 8; ++i) {
            if (!(i & step)) swap_bits(x[i], x[i + step], 8 * step, masks[step]);
        }
    }
    for (int i = 0; i < 8; ++i) __builtin_memcpy(to + i * to_row, &x[i], 8);
}

// to[j][i] = from[i][j] for channels i of tokens j.
inline void transpose(const uint8_t* from, int64_t channels, int64_t tokens, uint8_t* to) {
    int64_t i = 0;
    for (; i + 8 <= channels; i += 8) {
        for (int64_t j = 0; j < tokens; j += 8) {
            transpose_8x8(from + i * tokens + j, tokens, to + j * kChannels + i, kChannels);
        }
    }
    for (; i < channels; ++i) {
        for (int64_t j = 0; j < tokens; ++j) to[j * kChannels + i] = from[i * tokens + j];
    }
}

// Calls f(t, slot) for the tokens of the n-th block.
template <class F>
void for_tokens(const RestoreKvArgs& args, int64_t n, F f) {
    const int64_t first = n * args.tokens;
    for (int64_t t = 0; t < args.tokens; ++t) f(t, at(args.slots, first + t));
}

// Keys before their rotation, a head to its slots. `rows` are its channels.
template <class T>
void restore_keys(const RestoreKvArgs& args, const uint8_t* rows, int64_t n, int64_t head) {
    const int64_t tokens = args.tokens, row_bytes = args.key_format.bytes();
    for (int64_t first = 0; first < args.head_dim; first += kChannels) {
        const int64_t channels = args.head_dim - first < kChannels ? args.head_dim - first : kChannels;
        uint8_t codes[kChannels * kMostInGroup], turned[kMostInGroup * kChannels];
        float scale[kChannels], zero[kChannels];
        for (int64_t c = 0; c < channels; ++c) {
            const uint8_t* row = rows + (first + c) * row_bytes;
            codes_of_group(row, args.key_format, 0, codes + c * tokens);
            const Affine affine = affine_of_group(row, args.key_format, 0);
            scale[c] = to_float(affine.scale), zero[c] = to_float(affine.zero);
        }
        transpose(codes, channels, tokens, turned);
        for_tokens(args, n, [&](int64_t t, int64_t slot) {
            T* key = at_slot<T>(args.k_cache, slot, args.page_size, head) + first;
            const char* from = reinterpret_cast<const char*>(turned + t * kChannels);
            for_vectors(channels, [&](int64_t i, int m) {
                const Vec code = CodeBytes::load(from + i, m).uint8();
                store(fma(code, load(scale + i, m), load(zero + i, m)), key + i, m);
            });
        });
    }
}

template <class T>
void rotate_keys(const RestoreKvArgs& args, int64_t n, int64_t head) {
    const int64_t D = args.head_dim, first = n * args.tokens;
    for_tokens(args, n, [&](int64_t t, int64_t slot) {
        T* key = at_slot<T>(args.k_cache, slot, args.page_size, head);
        rope_head<T>(key, nullptr, args.cos_sin + at(args.positions, first + t) * D, D, 0.0f, key);
    });
}

template <class T>
void restore_values(const RestoreKvArgs& args, const uint8_t* rows, int64_t n, int64_t head) {
    const int64_t group = args.value_format.group, of_head = args.head_dim / group;
    for_tokens(args, n, [&](int64_t t, int64_t slot) {
        T* value = at_slot<T>(args.v_cache, slot, args.page_size, head);
        for (int64_t g = 0; g < of_head; ++g) {
            dequantize_group(rows + t * args.value_format.bytes(), args.value_format, head * of_head + g,
                             value + g * group);
        }
    });
}

}  // namespace

void restore_kv(const RestoreKvArgs& args, int64_t begin, int64_t end) {
    const int64_t heads = args.num_kv_heads;
    const int64_t head_bytes = args.head_dim * args.key_format.bytes();
    dispatch(args.dtype, [&]<class T>(T*) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t n = i / heads, head = i % heads, block = at(args.blocks, n);
            restore_keys<T>(args, args.keys + (block * heads + head) * head_bytes, n, head);
            rotate_keys<T>(args, n, head);
            restore_values<T>(args, args.values + block * args.tokens * args.value_format.bytes(), n, head);
        }
    });
}

TTS_END_ISA
