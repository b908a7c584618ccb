// torch.ops.tts_kernels.linear_logprob
#include <cmath>

#include "common.h"

namespace tts::ops {
namespace {

// log(exp(target - max) / sum) over all chunks of the vocabulary, in order.
float merge(const LinearLogprobArgs& args, int64_t chunks, int64_t row) {
    double peak = -INFINITY, sum = 0;
    for (int64_t c = 0; c < chunks; ++c) peak = std::fmax(peak, args.max[c * args.rows + row]);
    for (int64_t c = 0; c < chunks; ++c) {
        const double top = args.max[c * args.rows + row], part = args.sum[c * args.rows + row];
        sum += top == -INFINITY ? part : part * std::exp(top - peak);  // part may be NaN, else 0
    }
    return static_cast<float>(args.target[row] - peak - std::log(sum));
}

// Hidden states as the kernel takes them: float32, or bfloat16 where the weight is too.
Tensor operand(const Tensor& hidden, const Tensor& weight) {
    const DType type = dtype(hidden);
    if (type == DType::f32 || (type == DType::bf16 && dtype(weight) == DType::bf16))
        return dense_rows(hidden);
    return dense(torch::stable::to(hidden, ScalarType::Float));
}

Tensor linear_logprob(const Tensor& hidden_in, const Tensor& weight_in, const Tensor& targets_in,
                      double temperature) {
    require(hidden_in.dim() == 2 && weight_in.dim() == 2 && hidden_in.size(1) == weight_in.size(1), "weight");
    const Tensor hidden = operand(hidden_in, weight_in), weight = dense_rows(weight_in),
                 targets = dense(targets_in);
    const int64_t rows = hidden.size(0), chunks = divide_up(weight.size(0), kVocabularyChunk);
    require(targets.numel() == rows, "targets");
    require(std::isfinite(temperature) && temperature > 0, "temperature");
    Tensor out = empty(hidden, {rows}, ScalarType::Float);
    Tensor partials = empty(hidden, {2 * chunks, rows}, ScalarType::Float);
    LinearLogprobArgs args{.hidden = {hidden.const_data_ptr(), dtype(hidden)},
                           .hidden_stride = hidden.stride(0),
                           .weight = {weight.const_data_ptr(), dtype(weight)},
                           .weight_stride = weight.stride(0),
                           .targets = indices(targets),
                           .rows = rows,
                           .vocabulary = weight.size(0),
                           .width = weight.size(1),
                           .inv_temperature = static_cast<float>(1.0 / temperature),
                           .max = data<float>(partials),
                           .sum = data<float>(partials) + chunks * rows,
                           .target = data<float>(out)};
    require_range(args.targets, rows, 0, args.vocabulary);
    if (rows == 0) return out;
    parallel_for(0, chunks, 1,
                 [&](int64_t begin, int64_t end) { kernels().linear_logprob(args, begin, end); });
    float* result = args.target;
    parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) result[r] = merge(args, chunks, r);
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("linear_logprob(Tensor hidden, Tensor weight, Tensor targets, float temperature) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("linear_logprob", TTS_BOX(&linear_logprob)); }

}  // namespace tts::ops
