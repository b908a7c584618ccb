// torch.ops.tts_kernels.swiglu
#include "decoder.h"

namespace tts::ops {

Tensor swiglu(const Tensor& gate_up_in) {
    const Tensor gate_up = dense_rows(gate_up_in);
    const int64_t count = gate_up.size(0), width = gate_up.size(1) / 2;
    require(gate_up.size(1) % 2 == 0, "gate_up");
    const DType type = dtype(gate_up);
    Tensor out = empty(gate_up, {count, width}, gate_up.scalar_type());
    const SwigluArgs args{.gate_up = {gate_up.const_data_ptr(), type},
                          .stride = gate_up.stride(0),
                          .width = width,
                          .out = out.mutable_data_ptr()};
    // An exponential costs as much as reading about four elements.
    parallel_for(0, count, row_grain(4 * width),
                 [&](int64_t begin, int64_t end) { kernels().swiglu(args, begin, end); });
    return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) { m.def("swiglu(Tensor gate_up) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("swiglu", TTS_BOX(&swiglu)); }

}  // namespace tts::ops
