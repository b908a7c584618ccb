#pragma once

#include <cstdint>

#include "isa.h"
#include "paged_cache.h"

TTS_BEGIN_ISA

// Copies page `src` to page `dst`.
void copy_page(const PagedBytes& cache, int64_t src, int64_t dst);

TTS_END_ISA
