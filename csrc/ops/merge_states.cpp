// torch.ops.tts_kernels.merge_states
#include "attention.h"

namespace tts::ops {
namespace {

// One row reads and writes about 1 KB. For fewer rows a second thread is not worth it.
constexpr int64_t kRowsPerThread = 64;

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                        const Tensor& lse_b) {
    const MergeStates states(out_a, lse_a, out_b, lse_b);
    parallel_for(0, states.lse.numel(), kRowsPerThread,
                 [&](int64_t begin, int64_t end) { kernels().merge_states(states.args, begin, end); });
    return {states.out, states.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("merge_states", TTS_BOX(&merge_states)); }

}  // namespace tts::ops
