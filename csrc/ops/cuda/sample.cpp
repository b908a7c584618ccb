// torch.ops.tts_kernels.sample on a GPU
#include "../../cuda/sample.h"

#include "../sample.h"
#include "common.h"

namespace tts::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> sample(const Tensor& logits, const Tensor& seeds,
                                                  const Tensor& offsets, double temperature, int64_t top_k,
                                                  double top_p, double min_p,
                                                  const std::optional<Tensor>& temperatures,
                                                  const std::optional<Tensor>& top_ks,
                                                  const std::optional<Tensor>& top_ps,
                                                  const std::optional<Tensor>& min_ps, int64_t top_logprobs) {
    const OnDevice device(logits);
    const Sampling sampling(logits, seeds, offsets, temperature, top_k, top_p, min_p, temperatures, top_ks,
                            top_ps, min_ps, top_logprobs);
    const cuda::SampleGrid grid = cuda::sample_grid(sampling.args);
    const Tensor workspace = empty(logits, {grid.words}, ScalarType::Long);
    cuda::sample(sampling.args, grid, workspace.mutable_data_ptr(), device.stream());
    return sampling.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) { m.impl("sample", TTS_BOX(&sample)); }

}  // namespace tts::ops
