// A library to preload (LD_PRELOAD) on a processor without AMX: the kernels of the level amx then run there,
// as they were compiled, each instruction of AMX in software (tests/test_amx.py).
#include "amx_by_sigill.h"

// csrc/cpu/dispatch.cpp asks for it where it chooses a level.
extern "C" __attribute__((visibility("default"))) bool tts_amx_in_software() {
    amx_by_sigill::install();
    return true;
}
