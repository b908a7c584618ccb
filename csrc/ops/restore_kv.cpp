// torch.ops.tts_kernels.restore_kv_
#include "args/restore_kv.h"

#include "attention.h"
#include "rows.h"

namespace tts::ops {
namespace {

// Blocks of a tensor [B, rows, bytes] of rows in few bits.
const uint8_t* blocks_of(const Tensor& t, int64_t rows, const RowFormat& format) {
    require(is_here(t) && t.scalar_type() == ScalarType::Byte && t.dim() == 3 && t.is_contiguous(), "blocks");
    require(t.size(1) == rows && t.size(2) == format.bytes(), "blocks");
    return static_cast<const uint8_t*>(t.const_data_ptr());
}

void restore_kv_(const Tensor& keys, const Tensor& values, const Tensor& blocks_in, const Tensor& k_cache,
                 const Tensor& v_cache, const Tensor& positions_in, const Tensor& cos_sin_in,
                 const Tensor& slots_in, int64_t bits, int64_t group_size) {
    const Tensor blocks = dense(blocks_in), positions = dense(positions_in), slots = dense(slots_in);
    const Tensor cos_sin = dense(cos_sin_in);
    require(is_float(k_cache) && same_cache(k_cache, v_cache) && writable(k_cache) && writable(v_cache),
            "caches");
    const int64_t heads = k_cache.size(2), head_dim = k_cache.size(3);
    require(values.dim() == 3 && values.size(1) >= 16 && head_dim % 2 == 0, "values");
    const int64_t tokens = values.size(1);
    const RowFormat key_format = row_format(tokens, bits, tokens);
    const RowFormat value_format = row_format(heads * head_dim, bits, group_size);
    require(head_dim % group_size == 0, "group_size");
    require(cos_sin.dim() == 2 && cos_sin.size(1) == head_dim, "cos_sin");
    const int64_t count = blocks.numel();
    require(keys.size(0) == values.size(0), "keys");
    require(positions.numel() == count * tokens && slots.numel() == count * tokens, "positions and slots");
    const RestoreKvArgs args{.keys = blocks_of(keys, heads * head_dim, key_format),
                             .values = blocks_of(values, tokens, value_format),
                             .key_format = key_format,
                             .value_format = value_format,
                             .tokens = tokens,
                             .blocks = indices(blocks),
                             .num_kv_heads = heads,
                             .head_dim = head_dim,
                             .positions = indices(positions),
                             .cos_sin = float32(cos_sin),
                             .slots = indices(slots),
                             .page_size = k_cache.size(1),
                             .dtype = dtype(k_cache),
                             .k_cache = paged_to_write(k_cache),
                             .v_cache = paged_to_write(v_cache)};
    require_range(args.blocks, count, 0, keys.size(0));
    require_range(args.positions, count * tokens, 0, cos_sin.size(0));
    require_range(args.slots, count * tokens, 0, k_cache.size(0) * k_cache.size(1));
    parallel_for(0, count * heads, row_grain(2 * tokens * head_dim),
                 [&](int64_t begin, int64_t end) { kernels().restore_kv(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def(
        "restore_kv_(Tensor keys, Tensor values, Tensor blocks, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor positions, Tensor cos_sin, Tensor slots, int bits, int group_size) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("restore_kv_", TTS_BOX(&restore_kv_)); }

}  // namespace tts::ops
