// torch.ops.tts_kernels.copy_pages_
#include "attention.h"

namespace tts::ops {
namespace {

// Page copies for each thread; a page is 16 KB or more.
constexpr int64_t kPagesPerThread = 4;

void copy_pages_(std::vector<Tensor> caches, const Tensor& src, const Tensor& dst) {
    const CopyPages pages(caches, src, dst);
    const auto copies = static_cast<int64_t>(pages.caches.size()) * pages.count;
    parallel_for(0, copies, kPagesPerThread, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t page = i % pages.count;
            kernels().copy_page(pages.caches[static_cast<size_t>(i / pages.count)], at(pages.src, page),
                                at(pages.dst, page));
        }
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("copy_pages_(Tensor(a!)[] caches, Tensor src, Tensor dst) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("copy_pages_", TTS_BOX(&copy_pages_)); }

}  // namespace tts::ops
