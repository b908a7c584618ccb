#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace tts {

// Strides in bytes; a head's row is contiguous on both sides.
struct AppendArgs {
    const char* from;  // [T, heads, row]
    char* to;          // [pages, page_size, heads, row]
    int64_t from_token, from_head;
    int64_t to_page, to_token, to_head;
    int64_t page_size, heads, row_bytes;
    IndexArray slots;  // [T], checked
};

}  // namespace tts

TTS_BEGIN_ISA

// Tokens [begin, end) of one cache.
void append_kv(const AppendArgs& args, int64_t begin, int64_t end);

TTS_END_ISA
