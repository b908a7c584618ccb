// torch.ops.tts_kernels.pack_linear and linear
#include "decoder.h"
#include "linear_quantized.h"

namespace tts::ops {
namespace {

int64_t step(DType dtype) { return dtype == DType::bf16 ? kStep<bf16> : 1; }

Tensor pack_linear(const Tensor& weight_in) {
    require(weight_in.dim() == 2, "weight");
    const Tensor weight = dense_rows(weight_in);
    const DType type = dtype(weight);
    PackLinearArgs args{.weight = {weight.const_data_ptr(), type},
                        .stride = weight.stride(0),
                        .columns = weight.size(0),
                        .depth = weight.size(1),
                        .out = nullptr};
    const int64_t panels = divide_up(args.columns, kPanel), steps = divide_up(args.depth, step(type));
    Tensor out = empty(weight, {panels, steps, kPanel, step(type)}, weight.scalar_type());
    args.out = out.mutable_data_ptr();
    parallel_for(0, panels, 4,
                 [&](int64_t begin, int64_t end) { kernels().linear_pack_weight(args, begin, end); });
    return out;
}

}  // namespace

Tensor linear(const Tensor& x_in, const Tensor& weight, int64_t in_features, int64_t out_features,
              const std::optional<Tensor>& bias_in, const std::optional<Tensor>& residual_in,
              const std::optional<Tensor>& scale, const std::optional<Tensor>& zero) {
    require(x_in.dim() == 2, "x");
    const Tensor x = dense_rows(x_in);
    const DType type = dtype(x);
    const int64_t count = x.size(0), depth = x.size(1);
    require(depth == in_features && out_features >= 0, "weight");
    require(!bias_in || (bias_in->dim() == 1 && bias_in->size(0) == out_features && dtype(*bias_in) == type),
            "bias");
    const std::optional<Tensor> bias = dense(bias_in);
    std::optional<Tensor> residual;
    if (residual_in) {
        require(residual_in->dim() == 2 && residual_in->size(0) == count &&
                    residual_in->size(1) == out_features && dtype(*residual_in) == type,
                "residual");
        residual = dense_rows(*residual_in);
    }
    Tensor out = empty(x, {count, out_features}, x.scalar_type());
    if (scale) {
        const QuantizedWeight quantized = quantized_weight(weight, *scale, zero, depth, out_features);
        if (count == 0 || out_features == 0) return out;
        run_quantized(x, {.x = {x.const_data_ptr(), type},
                          .x_stride = x.stride(0),
                          .weight = quantized,
                          .rows = count,
                          .columns = out_features,
                          .depth = depth,
                          .bias = floats(bias),
                          .residual = residual ? residual->const_data_ptr() : nullptr,
                          .residual_stride = residual ? residual->stride(0) : 0,
                          .cut = {},
                          .packed = nullptr,
                          .scales = nullptr,
                          .totals = nullptr,
                          .out = out.mutable_data_ptr()});
        return out;
    }
    require(!zero && dtype(weight) == type && weight.is_contiguous() && weight.dim() == 4 &&
                weight.size(0) == divide_up(out_features, kPanel) &&
                weight.size(1) == divide_up(depth, step(type)) && weight.size(2) == kPanel &&
                weight.size(3) == step(type),
            "weight");
    if (count == 0 || out_features == 0) return out;
    LinearArgs args{.x = {x.const_data_ptr(), type},
                    .x_stride = x.stride(0),
                    .weight = weight.const_data_ptr(),
                    .rows = count,
                    .columns = out_features,
                    .depth = depth,
                    .bias = floats(bias),
                    .residual = residual ? residual->const_data_ptr() : nullptr,
                    .residual_stride = residual ? residual->stride(0) : 0,
                    .cut = kernels().linear_cut(count, out_features, depth, type),
                    .ahead = 0,
                    .packed = nullptr,
                    .out = out.mutable_data_ptr()};
    Tensor workspace = empty(x, {args.cut.packed}, ScalarType::Float);
    args.packed = data<float>(workspace);
    // A thread is worth starting for 2**12 packed elements, and for 2**20 multiplications or 2**18 weights.
    const int64_t row_grain = 1 + (1 << 12) * args.cut.tiles / (count * (depth + 1));
    parallel_for(0, args.cut.tiles, row_grain,
                 [&](int64_t begin, int64_t end) { kernels().linear_pack_x(args, begin, end); });
    const int64_t work = out_features * depth * (count < 4 ? 4 : count);
    const int64_t threads = threads_for(args.cut.units, work >> 20);
    args.ahead = args.cut.group * threads;
    for_units(args.cut.units, threads,
              [&](int64_t unit, int64_t) { kernels().linear(args, unit, unit + 1); });
    return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("pack_linear(Tensor weight) -> Tensor");
    m.def(
        "linear(Tensor x, Tensor weight, int in_features, int out_features, Tensor? bias, Tensor? residual, "
        "Tensor? scale=None, Tensor? zero=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) {
    m.impl("pack_linear", TTS_BOX(&pack_linear));
    m.impl("linear", TTS_BOX(&linear));
}

}  // namespace tts::ops
