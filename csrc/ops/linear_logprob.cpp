// torch.ops.tts_kernels.linear_logprob
#include "linear_logprob.h"

#include <cmath>

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
    float* result = args.target;
    parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) result[r] = merge(args, chunks, r);
    });
    return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("linear_logprob(Tensor hidden, Tensor weight, Tensor targets, float temperature) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("linear_logprob", TTS_BOX(&linear_logprob)); }

}  // namespace tts::ops
