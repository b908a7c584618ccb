// torch.ops.tts_kernels.prune on a GPU
#include "../../cuda/prune.h"

#include "../scoring.h"
#include "common.h"

namespace tts::ops {
namespace {

std::tuple<Tensor, Tensor> prune(const Tensor& scores_in, const Tensor& indptr, int64_t width,
                                 const std::optional<Tensor>& k, bool keep_order) {
    const OnDevice device(scores_in);
    const Tensor scores = dense(scores_in);
    require(scores.dim() == 1, "scores");
    const PrunePlan plan(indptr, scores.numel(), width, k, keep_order);
    Pruned out = plan.outputs(scores);
    cuda::prune(plan.args(floats(scores), out), plan.groups(), device.stream());
    return {out.indices, out.counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) { m.impl("prune", TTS_BOX(&prune)); }

}  // namespace tts::ops
