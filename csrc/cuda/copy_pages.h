#pragma once

#include <span>

#include "dtypes.h"
#include "paged_cache.h"
#include "stream.h"

namespace tts::cuda {

// Copies page src[i] to dst[i], i < count, within each cache.
void copy_pages(std::span<const PagedBytes> caches, IndexArray src, IndexArray dst, int64_t count,
                cudaStream_t stream);

}  // namespace tts::cuda
