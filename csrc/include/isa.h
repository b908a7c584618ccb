// The namespace of the instruction set that a file is compiled for.
//
// Every file in csrc/cpu is compiled once for each instruction set. All that it defines, and all inline code
// in csrc/include, is in `tts::<set>`, so that no two copies of a function have the same symbol. Otherwise
// the linker might use the AVX-512 copy of an inline function on a processor without AVX-512.
#pragma once

#ifndef TTS_ISA
#define TTS_ISA generic
#endif

// For arithmetic that is shared by CUDA and CPU kernels.
#if defined(__CUDACC__)
#define TTS_HD __host__ __device__
#else
#define TTS_HD
#endif

// Parameters and tables have the same layout everywhere: they are plain structs in `tts`, without functions.
// clang-format off
#define TTS_BEGIN_ISA namespace tts { inline namespace TTS_ISA {
#define TTS_END_ISA } }
// clang-format on
