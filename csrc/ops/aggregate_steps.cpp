// torch.ops.tts_kernels.aggregate_steps
#include "scoring.h"

namespace tts::ops {
namespace {

Tensor aggregate_steps(const Tensor& scores, const Tensor& indptr, const std::string& how) {
    const AggregateSteps call(scores, indptr, how);
    parallel_for(0, call.candidates, 2048,
                 [&](int64_t begin, int64_t end) { kernels().aggregate_steps(call.args, begin, end); });
    return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("aggregate_steps(Tensor scores, Tensor indptr, str how) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("aggregate_steps", TTS_BOX(&aggregate_steps)); }

}  // namespace tts::ops
