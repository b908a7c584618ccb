// torch.ops.tts_kernels.aggregate_steps
#include "scoring.h"

namespace tts::ops {
namespace {

Tensor aggregate_steps(const Tensor& scores_in, const Tensor& indptr_in, const std::string& how) {
    const Tensor scores = dense(scores_in), indptr = dense(indptr_in);
    require(scores.dim() == 1, "scores");
    AggregateStepsArgs args = aggregate_args(indptr, scores.numel(), how);
    const int64_t candidates = indptr.numel() - 1;
    Tensor out = empty(scores, {candidates}, ScalarType::Float);
    args.scores = floats(scores);
    args.out = data<float>(out);
    parallel_for(0, candidates, 2048,
                 [&](int64_t begin, int64_t end) { kernels().aggregate_steps(args, begin, end); });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("aggregate_steps(Tensor scores, Tensor indptr, str how) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("aggregate_steps", TTS_BOX(&aggregate_steps)); }

}  // namespace tts::ops
