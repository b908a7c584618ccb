// torch.ops.tts_kernels.cpu_isa: which instruction sets the CPU kernels can use, and which is in use.
#include "common.h"

namespace tts::ops {
namespace {

std::string cpu_isa() { return isa_in_use(); }
std::string cpu_isas() { return isa_supported(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("cpu_isa() -> str");
    m.def("cpu_isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TTS_BOX(&cpu_isa));
    m.impl("cpu_isas", TTS_BOX(&cpu_isas));
}

}  // namespace tts::ops
