// torch.ops.tts_kernels.append_kv_
#include "attention.h"

namespace tts::ops {
namespace {

// Tokens a thread: below this, copying costs less than waking a second one.
constexpr int64_t kTokensPerThread = 64;

void append_kv_(Tensor k_cache, Tensor v_cache, const Tensor& k_in, const Tensor& v_in,
                const Tensor& slots_in) {
    const Tensor slots = dense(slots_in);
    const IndexArray index = indices(slots);
    require(same_cache(k_cache, v_cache) && writable(k_cache) && writable(v_cache), "caches");
    require(fits(k_in, k_cache, slots.numel()) && fits(v_in, v_cache, slots.numel()), "k, v");
    const Tensor k = rows_contiguous(k_in) ? k_in : dense(k_in),
                 v = rows_contiguous(v_in) ? v_in : dense(v_in);
    require_range(index, slots.numel(), 0, k_cache.size(0) * k_cache.size(1));
    const AppendKvArgs k_args = append_args(k_cache, k, index), v_args = append_args(v_cache, v, index);
    parallel_for(0, slots.numel(), kTokensPerThread, [&](int64_t begin, int64_t end) {
        kernels().append_kv(k_args, begin, end);
        kernels().append_kv(v_args, begin, end);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("append_kv_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slots) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("append_kv_", TTS_BOX(&append_kv_)); }

}  // namespace tts::ops
