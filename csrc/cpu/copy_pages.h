#pragma once

#include <cstdint>

#include "isa.h"
#include "paged_cache.h"

TTS_BEGIN_ISA

// The page `dst` becomes a copy of the page `src`.
void copy_page(const PagedBytes& cache, int64_t src, int64_t dst);

TTS_END_ISA
