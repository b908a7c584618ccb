// torch.ops.tts_kernels.linear_logprob on a GPU
#include "../../cuda/linear_logprob.h"

#include <cmath>

#include "common.h"

namespace tts::ops {
namespace {

Tensor linear_logprob(const Tensor& hidden_in, const Tensor& weight_in, const Tensor& targets_in,
                      double temperature) {
    const OnDevice device(hidden_in);
    require(hidden_in.dim() == 2 && weight_in.dim() == 2 && hidden_in.size(1) == weight_in.size(1), "weight");
    const Tensor hidden = dense_rows(hidden_in), weight = dense_rows(weight_in), targets = dense(targets_in);
    const int64_t rows = hidden.size(0), vocabulary = weight.size(0);
    const int64_t chunks = (vocabulary + cuda::kLogprobChunk - 1) / cuda::kLogprobChunk;
    require(targets.numel() == rows, "targets");
    require(std::isfinite(temperature) && temperature > 0, "temperature");
    Tensor out = empty(hidden, {rows}, ScalarType::Float);
    Tensor partials = empty(hidden, {2 * chunks, rows}, ScalarType::Float);
    const LinearLogprobArgs args{.hidden = {hidden.const_data_ptr(), dtype(hidden)},
                                 .hidden_stride = hidden.stride(0),
                                 .weight = {weight.const_data_ptr(), dtype(weight)},
                                 .weight_stride = weight.stride(0),
                                 .targets = indices(targets),
                                 .rows = rows,
                                 .vocabulary = vocabulary,
                                 .width = weight.size(1),
                                 .inv_temperature = static_cast<float>(1.0 / temperature),
                                 .max = data<float>(partials),
                                 .sum = data<float>(partials) + chunks * rows,
                                 .target = data<float>(out)};
    require_range(args.targets, rows, 0, vocabulary);
    cuda::linear_logprob(args, device.stream());
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) {
    m.impl("linear_logprob", TTS_BOX(&linear_logprob));
}

}  // namespace tts::ops
