#pragma once

#include <span>

#include "../cpu/copy_pages.h"
#include "stream.h"

namespace tts::cuda {

// Pages src[i] to dst[i], i < count, within each of the caches.
void copy_pages(std::span<const PageCopyArgs> caches, IndexArray src, IndexArray dst, int64_t count,
                cudaStream_t stream);

}  // namespace tts::cuda
