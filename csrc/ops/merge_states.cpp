// torch.ops.tts_kernels.merge_states
#include "common.h"

namespace tts::ops {
namespace {

// One row reads and writes about 1 KB; fewer than this many are not worth a second thread.
constexpr int64_t kRowsPerThread = 64;

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a_in, const Tensor& lse_a_in,
                                        const Tensor& out_b_in, const Tensor& lse_b_in) {
    const Tensor out_a = dense(out_a_in), out_b = dense(out_b_in), lse_a = dense(lse_a_in),
                 lse_b = dense(lse_b_in);
    require(out_a.dim() == 3 && out_b.dim() == 3 && lse_a.dim() == 2 && lse_b.dim() == 2, "dimensions");
    for (int i = 0; i < 3; ++i) require(out_a.size(i) == out_b.size(i), "out_b");
    for (int i = 0; i < 2; ++i)
        require(out_a.size(i) == lse_a.size(i) && out_a.size(i) == lse_b.size(i), "lse");
    require(out_a.scalar_type() == out_b.scalar_type() && out_b.is_cpu(), "out_b");
    Tensor out = empty(out_a, {out_a.size(0), out_a.size(1), out_a.size(2)}, out_a.scalar_type());
    Tensor lse = empty(out_a, {out_a.size(0), out_a.size(1)}, ScalarType::Float);
    const MergeStatesArgs args{.dtype = dtype(out_a),
                               .out_a = out_a.const_data_ptr(),
                               .out_b = out_b.const_data_ptr(),
                               .lse_a = float32(lse_a),
                               .lse_b = float32(lse_b),
                               .head_dim = out_a.size(2),
                               .out = out.mutable_data_ptr(),
                               .lse = data<float>(lse)};
    parallel_for(0, lse.numel(), kRowsPerThread,
                 [&](int64_t begin, int64_t end) { kernels().merge_states(args, begin, end); });
    return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("merge_states", TORCH_BOX(&merge_states)); }

}  // namespace tts::ops
