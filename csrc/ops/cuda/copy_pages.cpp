// torch.ops.tts_kernels.copy_pages_ on a GPU
#include "../../cuda/copy_pages.h"

#include "../attention.h"
#include "common.h"

namespace tts::ops {
namespace {

void copy_pages_(std::vector<Tensor> caches, const Tensor& src, const Tensor& dst) {
    const OnDevice device(src);
    const CopyPages pages(caches, src, dst);
    cuda::copy_pages(pages.caches, pages.src, pages.dst, pages.count, device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) { m.impl("copy_pages_", TTS_BOX(&copy_pages_)); }

}  // namespace tts::ops
