// torch.ops.tts_kernels.linear on a GPU
#include "../../cuda/linear.h"

#include "../linear.h"
#include "common.h"

namespace tts::ops {
namespace {

// Rows that tensor cores can read if their length allows it. The order of a row's sum must not depend on its
// address.
Tensor aligned_rows(const Tensor& x) {
    require(x.dim() == 2, "x");
    const bool in_units = dtype(x) == DType::f32 || x.size(1) % 8 != 0 ||
                          (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.stride(0) % 8 == 0);
    return in_units ? x : torch::stable::clone(x);
}

// Memory for the sums of chunks of the depth, if several blocks share the depth.
Tensor parts_of(const Linear& call) {
    const int64_t splits = cuda::linear_splits(call.x.size(0), call.x.size(1), dtype(call.x));
    return empty(call.x, {splits > 1 ? splits * call.out.size(0) * call.out.size(1) : 0}, ScalarType::Float);
}

Tensor linear(const Tensor& x, const Tensor& weight, int64_t in_features, int64_t out_features,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
              const std::optional<Tensor>& scale, const std::optional<Tensor>& zero) {
    const OnDevice device(x);
    const Linear call(aligned_rows(x), in_features, out_features, bias, residual);
    Tensor parts = parts_of(call);
    if (scale) {
        const LinearQuantizedArgs args =
            call.quantized(quantized_weight(weight, *scale, zero, in_features, out_features));
        if (!call.empty()) cuda::linear(args, data<float>(parts), device.stream());
        return call.out;
    }
    require(!zero && dtype(weight) == dtype(call.x) && weight.is_contiguous() && weight.dim() == 2 &&
                weight.size(0) == out_features && weight.size(1) == in_features,
            "weight");
    if (!call.empty()) cuda::linear(call.plain(weight), data<float>(parts), device.stream());
    return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, TTS_CUDA_KEY, m) { m.impl("linear", TTS_BOX(&linear)); }

}  // namespace tts::ops
