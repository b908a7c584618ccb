// What torch.ops.tts_kernels.linear does for weights of 8 or 4 bits.
#include "linear_quantized.h"

#include <algorithm>

namespace tts::ops {
namespace {

// How much of the depth has one scale: what its number of groups says.
int64_t group_of(int64_t depth, int64_t groups) {
    for (const int64_t group : {int64_t{32}, int64_t{64}, int64_t{128}, depth}) {
        if (groups == (group ? divide_up(depth, group) : 1)) return group;
    }
    throw std::runtime_error("scale");
}

const float* panels_of(const Tensor& t, int64_t panels, int64_t groups) {
    require(t.dim() == 3 && t.size(0) == panels && t.size(1) == groups && t.size(2) == kIntPanel, "scale");
    return float32(t);
}

}  // namespace

QuantizedWeight quantized_weight(const Tensor& data, const Tensor& scale, const std::optional<Tensor>& zero,
                                 int64_t in_features, int64_t out_features) {
    require(in_features >= 0 && in_features <= kIntDepth && out_features >= 0, "in_features");
    const int64_t panels = divide_up(out_features, kIntPanel), depth = round_up(in_features, kIntBlock);
    require(is_here(data) && data.scalar_type() == ScalarType::Byte && data.is_contiguous() &&
                data.dim() == 4 && data.size(0) == panels && data.size(2) == kIntPanel &&
                data.size(3) == kIntStep,
            "weight");
    const int64_t bits = data.size(1) == depth / 4 ? 8 : 4;
    require(data.size(1) == depth * bits / 32 && scale.dim() == 3, "weight");
    const int64_t groups = scale.size(1);
    return {.data = static_cast<const uint8_t*>(data.const_data_ptr()),
            .scale = panels_of(scale, panels, groups),
            .zero = zero ? panels_of(*zero, panels, groups) : nullptr,
            .bits = bits,
            .depth = depth,
            .group = std::max(group_of(depth, groups), kIntGroup),
            .groups = groups};
}

QuantizedRows quantize_rows(const Tensor& x, LinearQuantizedArgs& args) {
    args.cut = kernels().linear_quantized_cut(args.rows, args.columns, args.weight.depth);
    QuantizedRows rows{empty(x, {args.cut.packed_rows * args.cut.row_bytes}, ScalarType::Char),
                       empty(x, {args.rows}, ScalarType::Float),
                       empty(x, {args.rows, args.weight.groups}, ScalarType::Int)};
    args.packed = data<int8_t>(rows.packed);
    args.scales = data<float>(rows.scales);
    args.totals = data<int32_t>(rows.totals);
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
    for_units(args.cut.units, worth,
              [&](int64_t unit, int64_t) { kernels().linear_quantized(args, unit, unit + 1); });
}

}  // namespace tts::ops
