#pragma once

#include <cstdint>

#include "dtypes.h"
#include "paged_cache.h"

namespace tts {

// Strides are in bytes. A head's row is contiguous on both sides. A plain cache has the tokens' type.
struct AppendKvArgs {
    const char* from;  // [T, heads, row]
    int64_t from_token, from_head;
    PagedBytes to;
    IndexArray slots;          // [T]: page * page_size + offset
    DType dtype = DType::f32;  // of the tokens
    int64_t head_dim = 0;      // D
    KvFormat format = KvFormat::plain;
    KvScales scales = {nullptr, nullptr};
};

}  // namespace tts
