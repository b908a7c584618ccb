// The arguments of torch.ops.tts_kernels.linear, checked, on any device.
#pragma once

#include <algorithm>

#include "common.h"

namespace tts::ops {

struct Linear {
    Tensor x, out;
    std::optional<Tensor> bias, residual;

    Linear(const Tensor& x_in, int64_t in_features, int64_t out_features,
           const std::optional<Tensor>& bias_in, const std::optional<Tensor>& residual_in)
        : x(rows(x_in)), bias(dense(bias_in)) {
        const DType type = dtype(x);
        require(x.size(1) == in_features && out_features >= 0, "weight");
        require(!bias || (bias->dim() == 1 && bias->size(0) == out_features && dtype(*bias) == type), "bias");
        if (residual_in) {
            require(residual_in->dim() == 2 && residual_in->size(0) == x.size(0) &&
                        residual_in->size(1) == out_features && dtype(*residual_in) == type,
                    "residual");
            residual = dense_rows(*residual_in);
        }
        out = tts::ops::empty(x, {x.size(0), out_features}, x.scalar_type());
    }

    bool empty() const { return out.size(0) == 0 || out.size(1) == 0; }

    // The kernels' arguments, without workspaces and without those that depend on the instruction set.
    LinearArgs plain(const Tensor& weight) const {
        return {.x = {x.const_data_ptr(), dtype(x)},
                .x_stride = x.stride(0),
                .weight = weight.const_data_ptr(),
                .rows = out.size(0),
                .columns = out.size(1),
                .depth = x.size(1),
                .bias = floats(bias),
                .residual = residual ? residual->const_data_ptr() : nullptr,
                .residual_stride = residual ? residual->stride(0) : 0,
                .cut = {},
                .ahead = 0,
                .packed = nullptr,
                .out = out.mutable_data_ptr()};
    }

    LinearQuantizedArgs quantized(const QuantizedWeight& weight) const {
        return {.x = {x.const_data_ptr(), dtype(x)},
                .x_stride = x.stride(0),
                .weight = weight,
                .rows = out.size(0),
                .columns = out.size(1),
                .depth = x.size(1),
                .bias = floats(bias),
                .residual = residual ? residual->const_data_ptr() : nullptr,
                .residual_stride = residual ? residual->stride(0) : 0,
                .cut = {},
                .ahead = 0,
                .packed = nullptr,
                .scales = nullptr,
                .totals = nullptr,
                .outliers = nullptr,
                .starts = nullptr,
                .out = out.mutable_data_ptr()};
    }

  private:
    static Tensor rows(const Tensor& x) {
        require(x.dim() == 2, "x");
        return dense_rows(x);
    }
};

// The number of columns with one scale, from the number of groups.
inline int64_t group_of(int64_t depth, int64_t groups) {
    for (const int64_t group : {int64_t{32}, int64_t{64}, int64_t{128}, depth}) {
        if (groups == (group ? divide_up(depth, group) : 1)) return group;
    }
    throw std::runtime_error("scale");
}

inline const float* scale_panels(const Tensor& t, int64_t panels, int64_t groups) {
    require(t.dim() == 3 && t.size(0) == panels && t.size(1) == groups && t.size(2) == kIntPanel, "scale");
    return float32(t);
}

// The weight of these tensors: data [panels, depth / 4 (8 for 4 bits), 16, 4] uint8, scale and zero
// [panels, groups, 16] float32.
inline QuantizedWeight quantized_weight(const Tensor& data, const Tensor& scale,
                                        const std::optional<Tensor>& zero, int64_t in_features,
                                        int64_t out_features) {
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
            .scale = scale_panels(scale, panels, groups),
            .zero = zero ? scale_panels(*zero, panels, groups) : nullptr,
            .bits = bits,
            .depth = depth,
            .group = std::max(group_of(depth, groups), kIntGroup),
            .groups = groups};
}

}  // namespace tts::ops
