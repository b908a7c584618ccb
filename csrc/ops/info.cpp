// torch.ops.tts_kernels.cpu_isa: the instruction sets that the CPU kernels can use, the chosen one, and the
// reason.
#include "common.h"

namespace tts::ops {
namespace {

std::string cpu_isa() { return isa_in_use(); }
std::string cpu_isas() { return isa_supported(); }
std::string cpu_isa_reason() { return isa_reason(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("cpu_isa() -> str");
    m.def("cpu_isas() -> str");
    m.def("cpu_isa_reason() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TTS_BOX(&cpu_isa));
    m.impl("cpu_isas", TTS_BOX(&cpu_isas));
    m.impl("cpu_isa_reason", TTS_BOX(&cpu_isa_reason));
}

}  // namespace tts::ops
