// torch.ops.tts_kernels.copy_pages_
#include <algorithm>

#include "attention.h"

namespace tts::ops {
namespace {

// Page copies a thread: a page is 16 KB or more.
constexpr int64_t kPagesPerThread = 4;

// Each page is written once, and no page that is written is read: so the order of the copies is free.
void require_independent(IndexArray src, IndexArray dst, int64_t count) {
    std::vector<int64_t> written(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) written[static_cast<size_t>(i)] = at(dst, i);
    std::sort(written.begin(), written.end());
    require(std::adjacent_find(written.begin(), written.end()) == written.end(), "dst");
    for (int64_t i = 0; i < count; ++i) {
        require(!std::binary_search(written.begin(), written.end(), at(src, i)), "dst");
    }
}

void copy_pages_(std::vector<Tensor> caches, const Tensor& src_in, const Tensor& dst_in) {
    const Tensor src_tensor = dense(src_in), dst_tensor = dense(dst_in);
    const IndexArray src = indices(src_tensor), dst = indices(dst_tensor);
    const int64_t count = src_tensor.numel();
    require(dst_tensor.numel() == count, "dst");
    std::vector<PagedBytes> args;
    for (Tensor& cache : caches) {
        require(is_cache(cache) && writable(cache), "caches");
        require_range(src, count, 0, cache.size(0));
        require_range(dst, count, 0, cache.size(0));
        args.push_back(paged_bytes(cache));
    }
    require_independent(src, dst, count);
    const auto copies = static_cast<int64_t>(args.size()) * count;
    parallel_for(0, copies, kPagesPerThread, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            kernels().copy_page(args[static_cast<size_t>(i / count)], at(src, i % count), at(dst, i % count));
        }
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("copy_pages_(Tensor(a!)[] caches, Tensor src, Tensor dst) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("copy_pages_", TTS_BOX(&copy_pages_)); }

}  // namespace tts::ops
