// copy_pages_: copies whole pages within each cache, which is needed before a fork's first write.
//
//   caches [P, page_size, Hkv, D]:  cache[dst[i]] = cache[src[i]] for all i
//
// Elements of any type, also codes and scales of quantised caches, are handled as bytes. One launch copies up
// to 448 caches with the same layout (keys and values of 224 layers). Their addresses are a kernel parameter,
// which may have 4 KB: so nothing is copied to the device first, and a captured graph contains them. A block
// of 256 threads copies a page of one cache, 16 bytes per thread at a time: at 16 tokens of 8 heads of 128
// bfloat16 that is 32 KB and 8 iterations. The pages may be copied in any order, because no page is both read
// and written.
#include <algorithm>

#include "block_size.cuh"
#include "copy_pages.h"
#include "copy_rows.cuh"
#include "launch.cuh"
#include "vector.cuh"

namespace tts::cuda {
namespace {

constexpr int kThreads = block_size(256), kMaxCaches = 448;

struct PageCopyLaunch {
    PagedBytes layout;  // the same for all caches
    IndexArray src, dst;
    unsigned num_caches;
    char* caches[kMaxCaches];
};
static_assert(sizeof(PageCopyLaunch) <= 4096);

template <class Unit>
__global__ void __launch_bounds__(kThreads) copy_pages_kernel(const __grid_constant__ PageCopyLaunch call) {
    const PagedBytes& layout = call.layout;
    const unsigned i = blockIdx.x / call.num_caches;
    char* cache = call.caches[blockIdx.x % call.num_caches];
    const char* from = cache + at(call.src, i) * layout.page_stride;
    char* to = cache + at(call.dst, i) * layout.page_stride;
    for (int64_t token = 0; token < layout.page_size; ++token) {
        copy_rows<Unit>({.to = to + token * layout.token_stride,
                         .from = from + token * layout.token_stride,
                         .to_stride = layout.head_stride,
                         .from_stride = layout.head_stride,
                         .rows = static_cast<int>(layout.heads),
                         .units = static_cast<int>(layout.row_bytes / sizeof(Unit))});
    }
}

// A token's heads as one row, and a page's tokens as one row, if they are contiguous.
PagedBytes join(PagedBytes cache) {
    if (cache.head_stride == cache.row_bytes) {
        cache.row_bytes *= cache.heads, cache.head_stride = cache.row_bytes, cache.heads = 1;
    }
    if (cache.heads > 1) return cache;
    if (cache.token_stride == cache.row_bytes) {
        cache.row_bytes *= cache.page_size;
        cache.head_stride = cache.token_stride = cache.row_bytes, cache.page_size = 1;
    } else {  // each token is a row of the copy
        cache.heads = cache.page_size, cache.head_stride = cache.token_stride, cache.page_size = 1;
    }
    return cache;
}

bool same_layout(const PagedBytes& a, const PagedBytes& b) {
    return a.page_stride == b.page_stride && a.token_stride == b.token_stride &&
           a.head_stride == b.head_stride && a.page_size == b.page_size && a.heads == b.heads &&
           a.row_bytes == b.row_bytes;
}

// The largest number of bytes that is possible for every copy in the cache.
int unit(const PagedBytes& cache) {
    const int64_t strides = cache.page_stride | cache.token_stride | cache.head_stride | cache.row_bytes;
    return aligned<16>(cache.data, strides) ? 16 : aligned<2>(cache.data, strides) ? 2 : 1;
}

}  // namespace

void copy_pages(std::span<const PagedBytes> caches, IndexArray src, IndexArray dst, int64_t count,
                cudaStream_t stream) {
    for (size_t begin = 0, end = 0; begin < caches.size(); begin = end) {
        PageCopyLaunch call{
            .layout = join(caches[begin]), .src = src, .dst = dst, .num_caches = 0, .caches = {}};
        int bytes = 16;
        for (; end < caches.size() && end - begin < kMaxCaches && same_layout(caches[begin], caches[end]);
             ++end) {
            call.caches[call.num_caches++] = caches[end].data;
            bytes = std::min(bytes, unit(join(caches[end])));
        }
        const auto kernel = bytes == 16  ? copy_pages_kernel<uint4>
                            : bytes == 2 ? copy_pages_kernel<uint16_t>
                                         : copy_pages_kernel<uint8_t>;
        launch(kernel, count * call.num_caches, kThreads, 0, stream, call);
    }
}

}  // namespace tts::cuda
