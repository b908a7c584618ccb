// A CUDA stream as an argument of launchers. Callers need no CUDA header.
#pragma once

typedef struct CUstream_st* cudaStream_t;
