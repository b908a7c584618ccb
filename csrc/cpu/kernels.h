// The CPU kernels as a table of function pointers, one table an instruction set, chosen once (dispatch.cpp).
#pragma once

#include "aggregate_steps.h"
#include "linear_logprob.h"
#include "prune.h"
#include "sample.h"
#include "step_scores.h"

// Every CPU kernel, by name.
#define TTS_CPU_KERNELS(X) \
    X(aggregate_steps)     \
    X(sample_scan)         \
    X(sample_plan)         \
    X(sample_weigh)        \
    X(sample_draw)         \
    X(step_scores)         \
    X(linear_logprob)      \
    X(prune)               \
    X(gather_steps)        \
    X(hidden_layer)        \
    X(finish_steps)

namespace tts {

struct Kernels {
#define TTS_MEMBER(name) decltype(&TTS_ISA::name) name;
    TTS_CPU_KERNELS(TTS_MEMBER)
#undef TTS_MEMBER
};

// The table of the instruction set in use. The first call reads the processor and TTS_KERNELS_CPU_ISA.
const Kernels& kernels();

// "generic", "avx2", "avx512" or "avx512_bf16": the set in use, and a comma-separated list of those that this
// build has and this processor runs.
const char* isa_in_use();
const char* isa_supported();

}  // namespace tts

TTS_BEGIN_ISA

extern const Kernels kTable;

TTS_END_ISA
