// torch.ops.tts_kernels.append_kv_
#include "attention.h"

namespace tts::ops {
namespace {

// Tokens per thread. With fewer, copying costs less than waking a second thread.
constexpr int64_t kTokensPerThread = 64;

void append_kv_(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& slots,
                const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                const std::optional<Tensor>& k_zero, const std::optional<Tensor>& v_zero) {
    const AppendKv tokens(k_cache, v_cache, k, v, slots, {k_scale, v_scale, k_zero, v_zero});
    parallel_for(0, tokens.count, kTokensPerThread, [&](int64_t begin, int64_t end) {
        kernels().append_kv(tokens.k_args, begin, end);
        kernels().append_kv(tokens.v_args, begin, end);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def(
        "append_kv_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slots, Tensor(c!)? "
        "k_scale=None, Tensor(d!)? v_scale=None, Tensor(e!)? k_zero=None, Tensor(f!)? v_zero=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("append_kv_", TTS_BOX(&append_kv_)); }

}  // namespace tts::ops
