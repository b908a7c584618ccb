// Slots of a paged cache: page * page_size + offset.
#pragma once

#include <cstdint>

#include "isa.h"
#include "paged_cache.h"

TTS_BEGIN_ISA

// A head of the token in a slot.
template <class T>
inline T* at_slot(const PagedCache& cache, int64_t slot, int64_t page_size, int64_t head) {
    return static_cast<T*>(cache.data) + slot / page_size * cache.page_stride +
           slot % page_size * cache.token_stride + head * cache.head_stride;
}

TTS_END_ISA
