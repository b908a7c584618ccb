// torch.ops.tts_kernels.linear_logprob
#include "linear_logprob.h"

#include "linear_quantized.h"

namespace tts::ops {
namespace {

// log(exp(target - max) / sum) over all chunks of the vocabulary, in order.
template <class Args>
float merge(const Args& args, int64_t chunks, int64_t rows, int64_t row) {
    double peak = -INFINITY, sum = 0;
    for (int64_t c = 0; c < chunks; ++c) peak = std::fmax(peak, args.max[c * rows + row]);
    for (int64_t c = 0; c < chunks; ++c) {
        const double top = args.max[c * rows + row], part = args.sum[c * rows + row];
        sum += top == -INFINITY ? part : part * std::exp(top - peak);  // part may be NaN, else 0
    }
    return static_cast<float>(args.target[row] - peak - std::log(sum));
}

// Replaces each row's target by its log-probability.
template <class Args>
void merge_all(const Args& args, int64_t chunks, int64_t rows) {
    parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) args.target[r] = merge(args, chunks, rows, r);
    });
}

// Hidden states in a type that the kernel supports: float32, or bfloat16 if the weight is bfloat16, too.
Tensor operand(const Tensor& hidden, const Tensor& weight) {
    const DType type = dtype(hidden);
    if (type == DType::f32 || (type == DType::bf16 && dtype(weight) == DType::bf16)) return hidden;
    return torch::stable::to(hidden, ScalarType::Float);
}

Tensor linear_logprob(const Tensor& hidden, const Tensor& weight, const Tensor& targets, double temperature) {
    const LinearLogprob call(operand(hidden, weight), weight, targets, temperature, kVocabularyChunk);
    const LinearLogprobArgs& args = call.args;
    const int64_t rows = args.rows, chunks = call.chunks;
    if (rows == 0) return call.out;
    parallel_for(0, chunks, 1,
                 [&](int64_t begin, int64_t end) { kernels().linear_logprob(args, begin, end); });
    merge_all(args, chunks, rows);
    return call.out;
}

Tensor linear_logprob_quantized(const Tensor& hidden_in, const Tensor& weight, const Tensor& targets_in,
                                double temperature, int64_t in_features, int64_t vocabulary,
                                const Tensor& scale, const std::optional<Tensor>& zero) {
    require(hidden_in.dim() == 2 && hidden_in.size(1) == in_features, "hidden");
    const Tensor hidden = dense_rows(hidden_in), targets = dense(targets_in);
    const int64_t rows = hidden.size(0), chunks = divide_up(vocabulary, kVocabularyChunk);
    const QuantizedWeight quantized = quantized_weight(weight, scale, zero, in_features, vocabulary);
    require(targets.numel() == rows, "targets");
    require(std::isfinite(temperature) && temperature > 0, "temperature");
    Tensor out = empty(hidden, {rows}, ScalarType::Float);
    Tensor partials = empty(hidden, {2 * chunks, rows}, ScalarType::Float);
    QuantizedLogprobArgs args{.linear = {.x = {hidden.const_data_ptr(), dtype(hidden)},
                                         .x_stride = hidden.stride(0),
                                         .weight = quantized,
                                         .rows = rows,
                                         .columns = vocabulary,
                                         .depth = hidden.size(1),
                                         .bias = {nullptr, DType::f32},
                                         .residual = nullptr,
                                         .residual_stride = 0,
                                         .cut = {},
                                         .packed = nullptr,
                                         .scales = nullptr,
                                         .totals = nullptr,
                                         .outliers = nullptr,
                                         .starts = nullptr,
                                         .out = nullptr},
                              .targets = indices(targets),
                              .inv_temperature = static_cast<float>(1.0 / temperature),
                              .max = data<float>(partials),
                              .sum = data<float>(partials) + chunks * rows,
                              .target = data<float>(out)};
    require_range(args.targets, rows, 0, vocabulary);
    if (rows == 0) return out;
    const Tensor quantized_rows = quantize_rows(hidden, args.linear);
    parallel_for(0, chunks, 1,
                 [&](int64_t begin, int64_t end) { kernels().linear_logprob_quantized(args, begin, end); });
    merge_all(args, chunks, rows);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("linear_logprob(Tensor hidden, Tensor weight, Tensor targets, float temperature) -> Tensor");
    m.def(
        "linear_logprob_quantized(Tensor hidden, Tensor weight, Tensor targets, float temperature, int "
        "in_features, int vocabulary, Tensor scale, Tensor? zero) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) {
    m.impl("linear_logprob", TTS_BOX(&linear_logprob));
    m.impl("linear_logprob_quantized", TTS_BOX(&linear_logprob_quantized));
}

}  // namespace tts::ops
