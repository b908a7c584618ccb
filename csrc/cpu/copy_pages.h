#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace tts {

// One cache, strides in bytes.
struct PageCopyArgs {
    char* cache;  // [pages, page_size, heads, row]
    int64_t page, token, head;
    int64_t page_size, heads, row_bytes;
};

}  // namespace tts

TTS_BEGIN_ISA

// The page `dst` becomes a copy of the page `src`.
void copy_page(const PageCopyArgs& args, int64_t src, int64_t dst);

TTS_END_ISA
