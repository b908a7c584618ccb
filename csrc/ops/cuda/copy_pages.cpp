// torch.ops.tts_kernels.copy_pages_ on a GPU
#include "../../cuda/copy_pages.h"

#include "../attention.h"
#include "common.h"

namespace tts::ops {
namespace {

void copy_pages_(std::vector<Tensor> caches, const Tensor& src_in, const Tensor& dst_in) {
    const OnDevice device(src_in);
    const Tensor src = dense(src_in), dst = dense(dst_in);
    const IndexArray src_index = indices(src), dst_index = indices(dst);
    require(dst.numel() == src.numel(), "dst");
    std::vector<PagedBytes> args;
    for (Tensor& cache : caches) {
        require(is_cache(cache), "caches");
        if (cache.numel() > 0) args.push_back(paged_bytes(cache));
    }
    cuda::copy_pages(args, src_index, dst_index, src.numel(), device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) { m.impl("copy_pages_", TTS_BOX(&copy_pages_)); }

}  // namespace tts::ops
