// torch.ops.tts_kernels.decoder_layers_: a stack of decoder layers in one call.
//
//   x = x + o(attend(rope(qkv(norm(x)))))
//   x = x + down(swiglu(gate_up(norm(x))))      in each layer
//
// It only runs the operators one after another, but without the interpreter between them. While weights
// stream through the cache, a call from Python costs 10 us and more, and a decode step makes nine for each
// layer.
#include <algorithm>
#include <cmath>

#include "decoder.h"

namespace tts::ops {
namespace {

// The tensors of a layer, in their order in the list. An empty tensor means that the part is missing.
// clang-format off
enum Part : size_t {
    kInputNorm, kQkv, kQkvScale, kQkvZero, kQkvBias, kQNorm, kKNorm, kO, kOScale, kOZero, kOBias,
    kPostNorm, kGateUp, kGateUpScale, kGateUpZero, kGateUpBias, kDown, kDownScale, kDownZero, kDownBias, kParts
};
// clang-format on

struct Layer {
    const Tensor* parts;
    const Tensor& operator[](Part part) const { return parts[part]; }
    std::optional<Tensor> maybe(Part part) const {
        return parts[part].numel() ? std::optional<Tensor>(parts[part]) : std::nullopt;
    }
    // The projection whose weight is `part`. Its scale, zero and bias follow in the list.
    Tensor project(Part part, const Tensor& x, int64_t outputs, const std::optional<Tensor>& residual) const {
        const auto at = [&](size_t behind) { return maybe(static_cast<Part>(part + behind)); };
        return linear(x, parts[part], x.size(1), outputs, at(3), residual, at(1), at(2));
    }
};

// Rows [R, W] of a matrix [T, W].
Tensor select_rows(const Tensor& x, const Tensor& rows_in) {
    const Tensor rows = dense(rows_in);
    const IndexArray index = indices(rows);
    const int64_t count = rows.numel(), bytes = x.size(1) * x.element_size();
    require_range(index, count, 0, x.size(0));
    Tensor out = empty(x, {count, x.size(1)}, x.scalar_type());
    const auto* from = static_cast<const char*>(x.const_data_ptr());
    auto* to = static_cast<char*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < count; ++i) {
        std::copy_n(from + at(index, i) * x.stride(0) * x.element_size(), bytes, to + i * bytes);
    }
    return out;
}

// A layer's scales or zeros; none for plain caches.
std::optional<Tensor> beside(const std::vector<Tensor>& all, size_t layer) {
    return all.empty() ? std::nullopt : std::optional<Tensor>(all[layer]);
}

Tensor decoder_layers_(const Tensor& x_in, std::vector<Tensor> weights, std::vector<Tensor> k_caches,
                       std::vector<Tensor> v_caches, const Tensor& positions, const Tensor& cos_sin,
                       const Tensor& slots, const std::optional<Tensor>& rows, std::vector<Tensor> plan,
                       int64_t page_size, int64_t num_q_heads, int64_t num_kv_heads, int64_t max_slots,
                       int64_t intermediate, std::vector<int64_t> windows, double eps,
                       std::vector<Tensor> k_scales, std::vector<Tensor> v_scales,
                       std::vector<Tensor> k_zeros, std::vector<Tensor> v_zeros) {
    const size_t depth = windows.size();
    require(weights.size() == depth * kParts && k_caches.size() == depth && v_caches.size() == depth,
            "layers");
    for (const auto* all : {&k_scales, &v_scales, &k_zeros, &v_zeros}) {
        require(all->empty() || all->size() == depth, "scales, zeros");
    }
    require(plan.size() == 8 && cos_sin.dim() == 2 && cos_sin.size(1) > 0, "plan, cos_sin");
    const int64_t head_dim = cos_sin.size(1), inner = num_q_heads * head_dim;
    const int64_t qkv_width = (num_q_heads + 2 * num_kv_heads) * head_dim;
    const double scale = std::pow(static_cast<double>(head_dim), -0.5);
    Tensor x = dense_rows(x_in);
    const int64_t hidden = x.size(1);
    for (size_t i = 0; i < depth; ++i) {
        const Layer layer{&weights[i * kParts]};
        const std::optional<Tensor> k_scale = beside(k_scales, i), v_scale = beside(v_scales, i),
                                    k_zero = beside(k_zeros, i), v_zero = beside(v_zeros, i);
        const Tensor normed = std::get<0>(rms_norm(x, layer[kInputNorm], eps, std::nullopt));
        const Tensor qkv = layer.project(kQkv, normed, qkv_width, std::nullopt);
        const Tensor q =
            rope_append_(qkv, k_caches[i], v_caches[i], positions, cos_sin, slots, num_q_heads, num_kv_heads,
                         layer.maybe(kQNorm), layer.maybe(kKNorm), eps, k_scale, v_scale, k_zero, v_zero);
        Tensor attended = std::get<0>(tree_attention(q, k_caches[i], v_caches[i], plan[0], plan[1], plan[2],
                                                     plan[3], plan[4], plan[5], plan[6], plan[7], page_size,
                                                     num_kv_heads, max_slots, scale, 0.0, windows[i],
                                                     std::nullopt, k_scale, v_scale, k_zero, v_zero));
        attended = torch::stable::view(attended, {x.size(0), inner});
        if (rows && i + 1 == depth) {  // the other rows are no longer needed
            attended = select_rows(attended, *rows);
            x = select_rows(x, *rows);
        }
        x = layer.project(kO, attended, hidden, x);
        const Tensor post = std::get<0>(rms_norm(x, layer[kPostNorm], eps, std::nullopt));
        const Tensor gate_up = layer.project(kGateUp, post, 2 * intermediate, std::nullopt);
        x = layer.project(kDown, swiglu(gate_up), hidden, x);
    }
    return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def(
        "decoder_layers_(Tensor x, Tensor[] weights, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor "
        "positions, Tensor cos_sin, Tensor slots, Tensor? rows, Tensor[] plan, int page_size, int "
        "num_q_heads, int num_kv_heads, int max_slots, int intermediate, int[] windows, float eps, "
        "Tensor(c!)[] k_scales, Tensor(d!)[] v_scales, Tensor(e!)[] k_zeros, Tensor(f!)[] "
        "v_zeros) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("decoder_layers_", TTS_BOX(&decoder_layers_)); }

}  // namespace tts::ops
