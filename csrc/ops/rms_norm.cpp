// torch.ops.tts_kernels.rms_norm
#include <limits>

#include "decoder.h"

namespace tts::ops {

// Without a residual the second result is empty.
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_in, const Tensor& weight_in, double eps,
                                    const std::optional<Tensor>& residual_in) {
    const Tensor x = dense_rows(x_in), weight = dense(weight_in),
                 residual = residual_in ? dense_rows(*residual_in) : x;
    const DType type = dtype(x);
    const int64_t count = x.size(0), width = x.size(1);
    require(weight.dim() == 1 && weight.size(0) == width && dtype(weight) == type, "weight");
    require(residual.size(0) == count && residual.size(1) == width && dtype(residual) == type, "residual");
    require(eps >= 0.0 && eps <= std::numeric_limits<float>::max(), "eps");
    Tensor normed = empty(x, {count, width}, x.scalar_type());
    Tensor sum = empty(x, {residual_in ? count : 0, width}, x.scalar_type());
    const RmsNormArgs args{.x = {x.const_data_ptr(), type},
                           .x_stride = x.stride(0),
                           .residual = residual_in ? residual.const_data_ptr() : nullptr,
                           .residual_stride = residual.stride(0),
                           .weight = weight.const_data_ptr(),
                           .width = width,
                           .eps = static_cast<float>(eps),
                           .normed = normed.mutable_data_ptr(),
                           .sum = sum.mutable_data_ptr()};
    parallel_for(0, count, row_grain(width),
                 [&](int64_t begin, int64_t end) { kernels().rms_norm(args, begin, end); });
    return {normed, sum};
}

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("rms_norm", TTS_BOX(&rms_norm)); }

}  // namespace tts::ops
