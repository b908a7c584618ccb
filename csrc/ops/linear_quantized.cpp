// What torch.ops.tts_kernels.linear does for weights of 8 or 4 bits.
#include "linear_quantized.h"

#include <algorithm>

namespace tts::ops {

QuantizedRows quantize_rows(const Tensor& x, LinearQuantizedArgs& args) {
    args.cut = kernels().linear_quantized_cut(args.rows, args.columns, args.weight.depth);
    QuantizedRows rows{empty(x, {args.cut.packed_rows * args.cut.row_bytes}, ScalarType::Char),
                       empty(x, {args.rows}, ScalarType::Float),
                       empty(x, {args.rows, args.weight.groups}, ScalarType::Int),
                       empty(x, {args.rows, args.cut.outliers, 2}, ScalarType::Int),
                       empty(x, {args.rows, args.weight.groups + 1}, ScalarType::Int)};
    args.packed = data<int8_t>(rows.packed);
    args.scales = data<float>(rows.scales);
    args.totals = data<int32_t>(rows.totals);
    args.outliers = reinterpret_cast<Outlier*>(data<int32_t>(rows.outliers));
    args.starts = data<int32_t>(rows.starts);
    const int64_t grain = 1 + (1 << 14) / (args.depth + 1);
    parallel_for(0, args.rows, grain,
                 [&](int64_t begin, int64_t end) { kernels().linear_quantize_x(args, begin, end); });
    return rows;
}

void run_quantized(const Tensor& x, LinearQuantizedArgs args) {
    const QuantizedRows rows = quantize_rows(x, args);
    // A thread is worth starting for 2**18 bytes of weights, or for 2**22 multiplications.
    const int64_t weights = args.columns * args.weight.depth;
    const int64_t worth = std::max(weights * args.weight.bits >> 21, weights * args.rows >> 22);
    const int64_t threads = threads_for(args.cut.units, worth);
    args.ahead = args.cut.group * threads;
    for_units(args.cut.units, threads,
              [&](int64_t unit, int64_t) { kernels().linear_quantized(args, unit, unit + 1); });
}

}  // namespace tts::ops
