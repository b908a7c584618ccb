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

// No two slots are one memory, as those of an expanded tensor are.
inline bool writable(const Tensor& cache) {
    bool distinct = true;
    for (int i = 0; i < 3; ++i) distinct &= cache.stride(i) != 0 || cache.size(i) <= 1;
    return distinct;
}

// Two caches of one shape and dtype.
inline bool same_cache(const Tensor& k, const Tensor& v) {
    if (!is_cache(k) || !is_cache(v) || k.scalar_type() != v.scalar_type()) return false;
    bool same = true;
    for (int i = 0; i < 4; ++i) same &= k.size(i) == v.size(i);
    return same;
}

// A cache that is only read, and one that is written.
inline PagedCache paged(const Tensor& t) {
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}
inline PagedCache paged_to_write(const Tensor& t) {
    return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline PagedBytes paged_bytes(const Tensor& cache) {
    const int64_t item = cache.element_size();
    return {.data = static_cast<char*>(cache.mutable_data_ptr()),
            .page_stride = cache.stride(0) * item,
            .token_stride = cache.stride(1) * item,
            .head_stride = cache.stride(2) * item,
            .page_size = cache.size(1),
            .heads = cache.size(2),
            .row_bytes = cache.size(3) * item};
}

// New tokens [T, Hkv, D] for a cache.
inline AppendKvArgs append_args(const Tensor& cache, const Tensor& tokens, IndexArray slots) {
    const int64_t item = cache.element_size();
    return {.from = static_cast<const char*>(tokens.const_data_ptr()),
            .from_token = tokens.stride(0) * item,
            .from_head = tokens.stride(1) * item,
            .to = paged_bytes(cache),
            .slots = slots};
}

// Whether they are as many as there are slots, and of the cache's shape and dtype.
inline bool fits(const Tensor& tokens, const Tensor& cache, int64_t count) {
    return is_here(tokens) && tokens.scalar_type() == cache.scalar_type() && tokens.dim() == 3 &&
           tokens.size(0) == count && tokens.size(1) == cache.size(2) && tokens.size(2) == cache.size(3);
}

// merge_states, checked and ready to run: the inputs made dense and the results.
struct MergeStates {
    Tensor out_a, lse_a, out_b, lse_b;  // [T, H, D], [T, H]
    Tensor out, lse;
    MergeStatesArgs args;

    MergeStates(const Tensor& out_a_in, const Tensor& lse_a_in, const Tensor& out_b_in,
                const Tensor& lse_b_in)
        : out_a(dense(out_a_in)), lse_a(dense(lse_a_in)), out_b(dense(out_b_in)), lse_b(dense(lse_b_in)) {
        require(out_a.dim() == 3 && out_b.dim() == 3 && lse_a.dim() == 2 && lse_b.dim() == 2, "dimensions");
        for (int i = 0; i < 3; ++i) require(out_a.size(i) == out_b.size(i), "out_b");
        for (int i = 0; i < 2; ++i)
            require(out_a.size(i) == lse_a.size(i) && out_a.size(i) == lse_b.size(i), "lse");
        require(out_a.scalar_type() == out_b.scalar_type() && is_here(out_b), "out_b");
        out = empty(out_a, {out_a.size(0), out_a.size(1), out_a.size(2)}, out_a.scalar_type());
        lse = empty(out_a, {out_a.size(0), out_a.size(1)}, ScalarType::Float);
        args = {.dtype = dtype(out_a),
                .out_a = out_a.const_data_ptr(),
                .out_b = out_b.const_data_ptr(),
                .lse_a = float32(lse_a),
                .lse_b = float32(lse_b),
                .head_dim = out_a.size(2),
                .out = out.mutable_data_ptr(),
                .lse = data<float>(lse)};
    }
};

inline float* aligned(float* p) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t{63});
}

}  // namespace tts::ops
