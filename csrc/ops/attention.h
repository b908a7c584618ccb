// What the operators on the KV cache share.
#pragma once

#include <cmath>

#include "common.h"

namespace tts::ops {

// The last dimension is contiguous; the others may be strided.
inline bool rows_contiguous(const Tensor& t) {
    return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1;
}

// [pages, page_size, kv_heads, head_dim], rows contiguous.
inline bool is_cache(const Tensor& t) {
    return is_here(t) && t.dim() == 4 && is_float(t) && rows_contiguous(t);
}

// Two caches of one shape and dtype.
inline bool same_cache(const Tensor& k, const Tensor& v) {
    if (!is_cache(k) || !is_cache(v) || k.scalar_type() != v.scalar_type()) return false;
    bool same = true;
    for (int i = 0; i < 4; ++i) same &= k.size(i) == v.size(i);
    return same;
}

inline PagedCache paged(const Tensor& t) {
    return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline float* aligned(float* p) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t{63});
}

}  // namespace tts::ops
