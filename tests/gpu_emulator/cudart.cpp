// A CUDA runtime without CUDA, as much as csrc/cuda calls: kernels are registered by name, and a launch is
// handed to the emulator (library.py). Linked with the operators of csrc/ops/cuda it makes a library that
// runs them on CPU tensors.
//
// Every tensor whose address the operator asks for becomes a buffer that its kernels may touch: the linker
// sends torch's own functions through the __wrap_ ones below.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <map>
#include <string>

namespace {

// What library.py provides: runs a kernel, false if it fails; and learns of a buffer, or with size 0 that an
// operator begins.
using Launch = bool (*)(const char* kernel, const uint32_t* grid, const uint32_t* block, uint32_t shared,
                        void** args);
using Buffer = void (*)(uint64_t address, uint64_t bytes);
Launch run_kernel;
Buffer note_buffer;

struct Kernel {
    std::string name;
    size_t shared_limit = 48 << 10;  // until cudaFuncSetAttribute raises it
};

std::map<const void*, Kernel>& kernels() {
    static std::map<const void*, Kernel> registered;
    return registered;
}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} configuration;
cudaError_t last_error = cudaSuccess;

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, void** args, size_t shared) {
    const Kernel& k = kernels().at(kernel);
    if (shared > k.shared_limit) return last_error = cudaErrorInvalidValue;
    const uint32_t g[] = {grid.x, grid.y, grid.z}, b[] = {block.x, block.y, block.z};
    const bool good = run_kernel(k.name.c_str(), g, b, static_cast<uint32_t>(shared), args);
    return last_error = good ? cudaSuccess : cudaErrorLaunchFailure;
}

// The bytes from a tensor's first element to the end of its last.
void note(AtenTensorHandle tensor, const void* address) {
    int64_t dim = 0, size = 0, stride = 0, reach = 1;
    int32_t dtype = 0;
    aoti_torch_get_dim(tensor, &dim);
    aoti_torch_get_dtype(tensor, &dtype);
    for (int64_t i = 0; i < dim; ++i) {
        aoti_torch_get_size(tensor, i, &size);
        aoti_torch_get_stride(tensor, i, &stride);
        if (size == 0) return;
        reach += (size - 1) * stride;
    }
    note_buffer(reinterpret_cast<uint64_t>(address),
                static_cast<uint64_t>(reach) * aoti_torch_dtype_element_size(dtype));
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void emulator_connect(Launch launch, Buffer buffer) {
    run_kernel = launch;
    note_buffer = buffer;
}

void emulator_begin() { note_buffer(0, 0); }

// ---- torch ------------------------------------------------------------------------------------------------

AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** address) {
    const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, address);
    if (!error) note(tensor, *address);
    return error;
}

AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** address) {
    const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, address);
    if (!error) note(tensor, *address);
    return error;
}

// ---- what nvcc's host code calls --------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
    kernels()[host].name = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* host) {
    *handle = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t) {
    return launch(kernel, grid, block, args, shared);
}

// ---- what csrc/cuda calls ---------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidValue ? "invalid value" : "the emulated kernel failed";
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
    constexpr int kMost = 99 << 10;  // what a block may have on every architecture from sm_80 on
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > kMost)
        return cudaErrorInvalidValue;
    kernels().at(host).shared_limit = static_cast<size_t>(value);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
    __builtin_memset(p, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

// An A100's.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
    *value = 108;
    return cudaSuccess;
}

}  // extern "C"
