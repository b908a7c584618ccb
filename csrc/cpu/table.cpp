// This instruction set's table of kernels.
#include "kernels.h"

TTS_BEGIN_ISA

#define TTS_ENTRY(name) &name,
const Kernels kTable = {TTS_CPU_KERNELS(TTS_ENTRY)};
#undef TTS_ENTRY

TTS_END_ISA
