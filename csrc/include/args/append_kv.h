#pragma once

#include <cstdint>

#include "dtypes.h"
#include "paged_cache.h"

namespace tts {

// Strides in bytes; a head's row is contiguous on both sides.
struct AppendKvArgs {
    const char* from;  // [T, heads, row]
    int64_t from_token, from_head;
    PagedBytes to;
    IndexArray slots;  // [T]: page * page_size + offset
};

}  // namespace tts
