// Launches kernels. If CUDA refuses a call, an exception names it. Nothing here waits for the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "integers.h"
#include "stream.h"

namespace tts::cuda {

inline void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

// kernel<<<blocks, threads, shared>>>(args...). An empty grid launches nothing.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, cudaStream_t stream,
            Args&&... args) {
    // Dynamic shared memory, in bytes, that needs no request: with the kernel's static memory it stays below
    // 48 KB.
    constexpr int kWithoutAsking = 40 << 10;
    if (blocks == 0) return;
    if (blocks > INT32_MAX) throw std::runtime_error("CUDA: more than 2**31 - 1 blocks");
    if (shared > kWithoutAsking) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    }
    kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(static_cast<Args&&>(args)...);
    check(cudaGetLastError());
}

// The same for blocks that wait for each other. CUDA refuses a grid that cannot run on the device all at
// once.
template <class... Parameters>
void launch_together(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                     Parameters... args) {
    void* pointers[] = {&args...};
    check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), static_cast<unsigned>(blocks),
                                      threads, pointers, 0, stream));
}

}  // namespace tts::cuda
