// A CUDA stream, as launchers take it: no CUDA header is needed to call them.
#pragma once

typedef struct CUstream_st* cudaStream_t;
