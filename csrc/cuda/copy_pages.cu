// copy_pages_: whole pages within each cache, the copies that a fork's first write needs.
//
//   caches [P, page_size, Hkv, D]:  cache[dst[i]] = cache[src[i]] for all of them
//
// One launch for up to 448 caches of one layout (keys and values of 224 layers): their addresses travel as a
// kernel parameter, of which there are 4 KB, so nothing is copied to the device first and a captured graph
// has them. A block of 256 threads copies a page of a cache, 16 bytes a thread at a time: at 16 tokens of 8
// heads of 128 bfloat16 that is 32 KB and 8 turns. The pages may be copied in any order: none is both read
// and written.
#include "copy_pages.h"
#include "launch.cuh"
#include "rows.cuh"
#include "vector.cuh"

namespace tts::cuda {
namespace {

constexpr int kThreads = 256, kMaxCaches = 448;

struct PageCopyLaunch {
    PageCopyArgs layout;  // of all caches
    IndexArray src, dst;
    unsigned num_caches;
    char* caches[kMaxCaches];
};
static_assert(sizeof(PageCopyLaunch) <= 4096);

template <class Unit>
__global__ void __launch_bounds__(kThreads) copy_pages_kernel(const __grid_constant__ PageCopyLaunch call) {
    const PageCopyArgs& layout = call.layout;
    const unsigned i = blockIdx.x / call.num_caches;
    char* cache = call.caches[blockIdx.x % call.num_caches];
    const char* from = cache + at(call.src, i) * layout.page;
    char* to = cache + at(call.dst, i) * layout.page;
    for (int64_t token = 0; token < layout.page_size; ++token) {
        copy_rows<Unit>({.to = to + token * layout.token,
                         .from = from + token * layout.token,
                         .to_stride = layout.head,
                         .from_stride = layout.head,
                         .rows = static_cast<int>(layout.heads),
                         .units = static_cast<int>(layout.row_bytes / sizeof(Unit))});
    }
}

// A token's heads as one row, and a page's tokens, where they are.
PageCopyArgs join(PageCopyArgs args) {
    if (args.head == args.row_bytes) args.row_bytes *= args.heads, args.head = args.row_bytes, args.heads = 1;
    if (args.heads == 1 && args.token == args.row_bytes) {
        args.row_bytes *= args.page_size, args.head = args.token = args.row_bytes, args.page_size = 1;
    } else if (args.heads == 1) {  // tokens as the rows of a copy
        args.heads = args.page_size, args.head = args.token, args.page_size = 1;
    }
    return args;
}

bool same_layout(const PageCopyArgs& a, const PageCopyArgs& b) {
    return a.page == b.page && a.token == b.token && a.head == b.head && a.page_size == b.page_size &&
           a.heads == b.heads && a.row_bytes == b.row_bytes;
}

bool wide(const PageCopyArgs& args) {
    return aligned(args.cache, args.page | args.token | args.head | args.row_bytes);
}

}  // namespace

void copy_pages(std::span<const PageCopyArgs> caches, IndexArray src, IndexArray dst, int64_t count,
                cudaStream_t stream) {
    for (size_t begin = 0, end = 0; begin < caches.size(); begin = end) {
        PageCopyLaunch call{
            .layout = join(caches[begin]), .src = src, .dst = dst, .num_caches = 0, .caches = {}};
        bool in_units = true;
        for (; end < caches.size() && end - begin < kMaxCaches && same_layout(caches[begin], caches[end]);
             ++end) {
            call.caches[call.num_caches++] = caches[end].cache;
            in_units = in_units && wide(join(caches[end]));
        }
        const auto kernel = in_units ? copy_pages_kernel<uint4> : copy_pages_kernel<uint16_t>;
        launch(kernel, count * call.num_caches, kThreads, 0, stream, call);
    }
}

}  // namespace tts::cuda
