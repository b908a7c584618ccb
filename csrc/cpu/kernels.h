// The CPU kernels as a table of function pointers. There is one table for each instruction set
// (dispatch.cpp).
#pragma once

#include "aggregate_steps.h"
#include "append_kv.h"
#include "copy_pages.h"
#include "linear.h"
#include "linear_logprob.h"
#include "linear_quantized.h"
#include "merge_states.h"
#include "prune.h"
#include "quantize_rows.h"
#include "restore_kv.h"
#include "rms_norm.h"
#include "rope_append.h"
#include "sample.h"
#include "step_scores.h"
#include "swiglu.h"
#include "tree_attention.h"

// Every CPU kernel, by name.
#define TTS_CPU_KERNELS(X)      \
    X(aggregate_steps)          \
    X(append_kv)                \
    X(copy_page)                \
    X(dequantize_rows)          \
    X(linear)                   \
    X(linear_cut)               \
    X(linear_logprob)           \
    X(linear_logprob_quantized) \
    X(linear_pack_weight)       \
    X(linear_pack_x)            \
    X(linear_quantize_x)        \
    X(linear_quantized)         \
    X(linear_quantized_cut)     \
    X(merge_states)             \
    X(prune)                    \
    X(quantize_rows)            \
    X(restore_kv)               \
    X(rms_norm)                 \
    X(rope_append)              \
    X(sample_draw)              \
    X(sample_likeliest)         \
    X(sample_plan)              \
    X(sample_scan)              \
    X(sample_weigh)             \
    X(step_scores)              \
    X(step_scores_finish)       \
    X(step_scores_gather)       \
    X(step_scores_hidden)       \
    X(swiglu)                   \
    X(tree_attention)           \
    X(tree_attention_merge)     \
    X(tree_attention_scratch)

// Kernels that some instruction sets have themselves, while their other kernels are those of a larger set.
#define TTS_QUANTIZED_KERNELS(X) \
    X(linear_logprob_quantized)  \
    X(linear_quantize_x)         \
    X(linear_quantized)          \
    X(linear_quantized_cut)
#define TTS_AMX_KERNELS(X) \
    X(linear)              \
    X(linear_cut)          \
    X(linear_pack_x)       \
    X(tree_attention)      \
    TTS_QUANTIZED_KERNELS(X)

namespace tts {

struct Kernels {
#define TTS_MEMBER(name) decltype(&TTS_ISA::name) name;
    TTS_CPU_KERNELS(TTS_MEMBER)
#undef TTS_MEMBER
};

// The table for the chosen instruction set. The first call reads the processor and TTS_KERNELS_CPU_ISA.
const Kernels& kernels();

// The chosen set, such as "avx512"; a comma-separated list of the sets that this build has and this processor
// can run; and the reason for the choice.
const char* isa_in_use();
const char* isa_supported();
const char* isa_reason();

}  // namespace tts

TTS_BEGIN_ISA

extern const Kernels kTable;

TTS_END_ISA
