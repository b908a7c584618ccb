// The common part of the operators on the KV cache.
#pragma once

#include <algorithm>
#include <cmath>

#include "args/append_kv.h"
#include "args/merge_states.h"
#include "common.h"
#include "paged_cache.h"

namespace tts::ops {

// The last dimension is contiguous; the others may be strided.
inline bool rows_contiguous(const Tensor& t) {
    return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1;
}

// The format of a cache, from its dtype.
inline KvFormat format_of(const Tensor& cache) {
    switch (cache.scalar_type()) {
        case ScalarType::Char:
            return KvFormat::int8;
        case ScalarType::Byte:
            return KvFormat::int4;
        case ScalarType::Float8_e4m3fn:
            return KvFormat::e4m3;
        default:
            return KvFormat::plain;
    }
}

// Whether a cache with this format has scales.
inline bool is_quantized(KvFormat format) { return format == KvFormat::int8 || format == KvFormat::int4; }

// [pages, page_size, kv_heads, head_dim], rows contiguous; for int4 half as many bytes.
inline bool is_cache(const Tensor& t) {
    return is_here(t) && t.dim() == 4 && (is_float(t) || format_of(t) != KvFormat::plain) &&
           rows_contiguous(t);
}

// Whether no two slots share memory. In an expanded tensor they do.
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

// For a cache that is only read, and for one that is written.
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

// The scales and zeros of quantised caches.
struct ScaleTensors {
    const std::optional<Tensor>&k_scale, &v_scale, &k_zero, &v_zero;
};

// The caches of a layer, after checks: both plain and of one dtype, or both of another format with exactly
// the scales and zeros that it needs. CPU kernels do not read e4m3.
struct LayerCaches {
    const Tensor &k, &v;
    KvFormat format;
    int64_t head_dim;  // of the heads that they hold
    KvScales k_scales, v_scales;

    // For tokens of this dtype.
    LayerCaches(const Tensor& k_cache, const Tensor& v_cache, ScalarType tokens, const ScaleTensors& beside)
        : k(k_cache), v(v_cache), format(format_of(k_cache)) {
        require(same_cache(k, v), "caches");
        require(format != KvFormat::plain || k.scalar_type() == tokens, "caches");
        require(format != KvFormat::e4m3 || !kReadable, "caches");
        head_dim = format == KvFormat::int4 ? 2 * k.size(3) : k.size(3);
        require(format == KvFormat::plain || head_dim >= 1, "caches");
        k_scales = {numbers(beside.k_scale, is_quantized(format)),
                    numbers(beside.k_zero, format == KvFormat::int4)};
        v_scales = {numbers(beside.v_scale, is_quantized(format)),
                    numbers(beside.v_zero, format == KvFormat::int4)};
    }

    void require_writable() const { require(writable(k) && writable(v), "caches"); }

  private:
    f16* numbers(const std::optional<Tensor>& t, bool wanted) const {
        require(t.has_value() == wanted, "scales, zeros");
        if (!wanted) return nullptr;
        require(is_here(*t) && t->scalar_type() == ScalarType::Half && t->is_contiguous() && t->dim() == 3,
                "scales, zeros");
        for (int i = 0; i < 3; ++i) require(t->size(i) == k.size(i), "scales, zeros");
        return static_cast<f16*>(const_cast<void*>(t->const_data_ptr()));
    }
};

// append_kv_, checked and ready to run: new tokens [T, Hkv, D] for both caches of a layer, and their slots.
struct AppendKv {
    Tensor slots, k, v;
    int64_t count;
    AppendKvArgs k_args, v_args;

    AppendKv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_in, const Tensor& v_in,
             const Tensor& slots_in, const ScaleTensors& beside)
        : slots(dense(slots_in)), count(slots.numel()) {
        const IndexArray index = indices(slots);
        const LayerCaches caches(k_cache, v_cache, k_in.scalar_type(), beside);
        caches.require_writable();
        require(fits(k_in, caches, count) && fits(v_in, caches, count), "k, v");
        require(v_in.scalar_type() == k_in.scalar_type(), "v");
        require_range(index, count, 0, k_cache.size(0) * k_cache.size(1));
        k = rows_contiguous(k_in) ? k_in : dense(k_in);
        v = rows_contiguous(v_in) ? v_in : dense(v_in);
        k_args = args(caches, k_cache, k, index, caches.k_scales);
        v_args = args(caches, v_cache, v, index, caches.v_scales);
    }

  private:
    // Whether there is one token for each slot, in the shape of the caches.
    static bool fits(const Tensor& tokens, const LayerCaches& caches, int64_t count) {
        return is_here(tokens) && is_float(tokens) && tokens.dim() == 3 && tokens.size(0) == count &&
               tokens.size(1) == caches.k.size(2) && tokens.size(2) == caches.head_dim;
    }

    static AppendKvArgs args(const LayerCaches& caches, const Tensor& cache, const Tensor& tokens,
                             IndexArray slots, KvScales scales) {
        const int64_t item = tokens.element_size();
        return {.from = static_cast<const char*>(tokens.const_data_ptr()),
                .from_token = tokens.stride(0) * item,
                .from_head = tokens.stride(1) * item,
                .to = paged_bytes(cache),
                .slots = slots,
                .dtype = dtype(tokens),
                .head_dim = caches.head_dim,
                .format = caches.format,
                .scales = scales};
    }
};

// copy_pages_, checked and ready to run: pages src[i] to dst[i], i < count, within each cache that has any.
struct CopyPages {
    Tensor src_tensor, dst_tensor;
    IndexArray src, dst;
    int64_t count;
    std::vector<PagedBytes> caches;

    CopyPages(const std::vector<Tensor>& tensors, const Tensor& src_in, const Tensor& dst_in)
        : src_tensor(dense(src_in)),
          dst_tensor(dense(dst_in)),
          src(indices(src_tensor)),
          dst(indices(dst_tensor)),
          count(src_tensor.numel()) {
        require(dst_tensor.numel() == count, "dst");
        for (const Tensor& cache : tensors) {
            require(is_cache(cache) && writable(cache), "caches");
            require_range(src, count, 0, cache.size(0));
            require_range(dst, count, 0, cache.size(0));
            if (cache.numel() > 0) caches.push_back(paged_bytes(cache));
        }
        if constexpr (kReadable) require_independent();
    }

  private:
    // Each page is written once, and no page that is written is read, so the copies may have any order.
    void require_independent() const {
        std::vector<int64_t> written(static_cast<size_t>(count));
        for (int64_t i = 0; i < count; ++i) written[static_cast<size_t>(i)] = at(dst, i);
        std::sort(written.begin(), written.end());
        require(std::adjacent_find(written.begin(), written.end()) == written.end(), "dst");
        for (int64_t i = 0; i < count; ++i) {
            require(!std::binary_search(written.begin(), written.end(), at(src, i)), "dst");
        }
    }
};

// merge_states, checked and ready to run: the inputs made dense, and the results.
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
