// The namespace of the instruction set that a file is compiled for.
//
// Every file in csrc/cpu is compiled once per instruction set. All that it defines, and all inline code in
// csrc/include, lives in `tts::<set>`, so that no two copies of a function share a symbol: otherwise the
// linker might keep the AVX-512 copy of an inline function for a processor that has no AVX-512.
#pragma once

#ifndef TTS_ISA
#define TTS_ISA generic
#endif

// Arithmetic that CUDA kernels share with the CPU's.
#if defined(__CUDACC__)
#define TTS_HD __host__ __device__
#else
#define TTS_HD
#endif

// Parameters and tables have one layout everywhere: they are plain structs in `tts`, without functions.
// clang-format off
#define TTS_BEGIN_ISA namespace tts { inline namespace TTS_ISA {
#define TTS_END_ISA } }
// clang-format on
