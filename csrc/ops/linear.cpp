// torch.ops.tts_kernels.pack_linear and linear
#include "linear.h"

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

Tensor linear(const Tensor& x, const Tensor& weight, int64_t in_features, int64_t out_features,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
              const std::optional<Tensor>& scale, const std::optional<Tensor>& zero) {
    const Linear call(x, in_features, out_features, bias, residual);
    if (scale) {
        const LinearQuantizedArgs args =
            call.quantized(quantized_weight(weight, *scale, zero, in_features, out_features));
        if (!call.empty()) run_quantized(call.x, args);
        return call.out;
    }
    const DType type = dtype(call.x);
    require(!zero && dtype(weight) == type && weight.is_contiguous() && weight.dim() == 4 &&
                weight.size(0) == divide_up(out_features, kPanel) &&
                weight.size(1) == divide_up(in_features, step(type)) && weight.size(2) == kPanel &&
                weight.size(3) == step(type),
            "weight");
    if (call.empty()) return call.out;
    LinearArgs args = call.plain(weight);
    args.cut = kernels().linear_cut(args.rows, args.columns, args.depth, type);
    Tensor workspace = empty(call.x, {args.cut.packed}, ScalarType::Float);
    args.packed = data<float>(workspace);
    // A thread is used for each 2**12 packed elements, and for each 2**19 multiplications or 2**17 weights.
    const int64_t row_grain = 1 + (1 << 12) * args.cut.tiles / (args.rows * (args.depth + 1));
    parallel_for(0, args.cut.tiles, row_grain,
                 [&](int64_t begin, int64_t end) { kernels().linear_pack_x(args, begin, end); });
    const int64_t work = args.columns * args.depth * (args.rows < 4 ? 4 : args.rows);
    const int64_t threads = threads_for(args.cut.units, work >> 19);
    args.ahead = args.cut.group * threads;
    for_units(args.cut.units, threads,
              [&](int64_t unit, int64_t) { kernels().linear(args, unit, unit + 1); });
    return call.out;
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
