#pragma once

#include <cstdint>

#include "args/quantize_rows.h"
#include "dtypes.h"
#include "paged_cache.h"

namespace tts {

// Blocks of tokens in few bits. B blocks are stored, and n of them are restored.
struct RestoreKvArgs {
    const uint8_t* keys;    // [B, Hkv D, bytes]: a row for each channel of the keys, of one group
    const uint8_t* values;  // [B, tokens, bytes]: a row for each token, of groups within heads
    RowFormat key_format, value_format;
    int64_t tokens;     // of a block
    IndexArray blocks;  // [n]
    int64_t num_kv_heads;
    int64_t head_dim;      // D, even
    IndexArray positions;  // [n * tokens]: rows of cos_sin
    const float* cos_sin;  // [max_position, D]: cosines of D / 2 angles, then sines
    IndexArray slots;      // [n * tokens]: page * page_size + offset
    int64_t page_size;
    DType dtype;
    PagedCache k_cache, v_cache;
};

}  // namespace tts
