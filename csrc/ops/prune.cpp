// torch.ops.tts_kernels.prune
#include "scoring.h"

namespace tts::ops {
namespace {

std::tuple<Tensor, Tensor> prune(const Tensor& scores_in, const Tensor& indptr, int64_t width,
                                 const std::optional<Tensor>& k, bool keep_order) {
    const Tensor scores = dense(scores_in);
    require(scores.dim() == 1, "scores");
    const Pruned out = PrunePlan(indptr, scores.numel(), width, k, keep_order).run(scores);
    return {out.indices, out.counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("prune(Tensor scores, Tensor indptr, int width, Tensor? k, bool keep_order) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("prune", TTS_BOX(&prune)); }

}  // namespace tts::ops
