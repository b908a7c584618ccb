// The operators of a decoder layer, as decoder_layers_ calls them.
#pragma once

#include "common.h"

namespace tts::ops {

Tensor linear(const Tensor& x, const Tensor& weight, int64_t in_features, int64_t out_features,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
              const std::optional<Tensor>& scale, const std::optional<Tensor>& zero);

// Without a residual the second result is empty.
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps,
                                    const std::optional<Tensor>& residual);

Tensor rope_append_(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
                    const Tensor& cos_sin, const Tensor& slots, int64_t num_q_heads, int64_t num_kv_heads,
                    const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
                    const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                    const std::optional<Tensor>& k_zero, const std::optional<Tensor>& v_zero);

Tensor swiglu(const Tensor& gate_up);

std::tuple<Tensor, Tensor> tree_attention(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& rows,
    const Tensor& positions, const Tensor& pages, const Tensor& segments, const Tensor& tasks,
    const Tensor& merge_indptr, const Tensor& merge_slots, const Tensor& sizes, int64_t page_size,
    int64_t num_kv_heads, int64_t max_slots, double scale, double softcap, int64_t window,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, const std::optional<Tensor>& k_zero,
    const std::optional<Tensor>& v_zero);

}  // namespace tts::ops
