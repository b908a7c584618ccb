// What torch.ops.tts_kernels.linear does for weights of 8 or 4 bits.
#include "linear_quantized.h"

#include <algorithm>
#include <utility>

namespace tts::ops {

Tensor quantize_rows(const Tensor& x, LinearQuantizedArgs& args) {
    args.cut = kernels().linear_quantized_cut(args.rows, args.columns, args.weight.depth);
    const int64_t rows = args.rows, groups = args.weight.groups, cache_line = 64;
    int64_t bytes = 0;
    const auto take = [&](int64_t size) { return std::exchange(bytes, round_up(bytes + size, cache_line)); };
    const int64_t packed = take(args.cut.packed_rows * args.cut.row_bytes);
    const int64_t scales = take(rows * 4), totals = take(rows * groups * 4);
    const int64_t outliers = take(rows * args.cut.outliers * static_cast<int64_t>(sizeof(Outlier)));
    const int64_t starts = take(rows * (groups + 1) * 4);
    Tensor workspace = empty(x, {bytes}, ScalarType::Char);
    auto* memory = data<int8_t>(workspace);
    args.packed = memory + packed;
    args.scales = reinterpret_cast<float*>(memory + scales);
    args.totals = reinterpret_cast<int32_t*>(memory + totals);
    args.outliers = reinterpret_cast<Outlier*>(memory + outliers);
    args.starts = reinterpret_cast<int32_t*>(memory + starts);
    const int64_t grain = 1 + (1 << 14) / (args.depth + 1);
    parallel_for(0, args.rows, grain,
                 [&](int64_t begin, int64_t end) { kernels().linear_quantize_x(args, begin, end); });
    return workspace;
}

void run_quantized(const Tensor& x, LinearQuantizedArgs args) {
    const Tensor rows = quantize_rows(x, args);
    // A thread is used for each 2**17 bytes of weights, or for each 2**20 multiplications.
    const int64_t weights = args.columns * args.weight.depth;
    const int64_t worth = std::max(weights * args.weight.bits >> 20, weights * args.rows >> 20);
    const int64_t threads = threads_for(args.cut.units, worth);
    args.ahead = args.cut.group * threads;
    for_units(args.cut.units, threads,
              [&](int64_t unit, int64_t) { kernels().linear_quantized(args, unit, unit + 1); });
}

}  // namespace tts::ops
