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
#include <cstring>
#include <map>
#include <string>

extern "C" cudaStream_t emulator_stream();

namespace {

// What library.py provides: runs a kernel, false if it fails; and learns of a buffer, or with size 0 that an
// operator begins. `limit`: what static and dynamic shared memory may be together.
// `together`: blocks may wait for each other.
using Launch = bool (*)(const char* kernel, const uint32_t* grid, const uint32_t* block, uint32_t shared,
                        uint32_t limit, bool together, void** args);
using Buffer = void (*)(uint64_t address, uint64_t bytes);
Launch run_kernel;
Buffer note_buffer;

// Bytes of shared memory of a block: without asking, what every architecture from sm_80 on has, and what an
// A100 has, for an operator that has asked the device.
constexpr uint32_t kWithoutAsking = 48 << 10, kEverywhere = 99 << 10, kMost = 163 << 10;
bool asked_device;
constexpr int kSms = 108;  // an A100's

uint32_t most_shared() { return asked_device ? kMost : kEverywhere; }

struct Kernel {
    std::string name;
    uint32_t asked = 0;  // by cudaFuncSetAttribute
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
char stream_of_torch;

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream,
                   bool together) {
    const Kernel& k = kernels().at(kernel);
    if (stream != emulator_stream()) return last_error = cudaErrorInvalidResourceHandle;
    if (shared > (k.asked ? k.asked : kWithoutAsking)) return last_error = cudaErrorInvalidValue;
    const uint32_t g[] = {grid.x, grid.y, grid.z}, b[] = {block.x, block.y, block.z};
    const bool good = run_kernel(k.name.c_str(), g, b, static_cast<uint32_t>(shared),
                                 k.asked ? most_shared() : kWithoutAsking, together, args);
    return last_error = good ? cudaSuccess : cudaErrorLaunchFailure;
}

// The bytes from a tensor's first element to the end of its last.
uint64_t reach_of(AtenTensorHandle tensor) {
    int64_t dim = 0, size = 0, stride = 0, reach = 1;
    int32_t dtype = 0;
    aoti_torch_get_dim(tensor, &dim);
    aoti_torch_get_dtype(tensor, &dtype);
    for (int64_t i = 0; i < dim; ++i) {
        aoti_torch_get_size(tensor, i, &size);
        aoti_torch_get_stride(tensor, i, &stride);
        if (size == 0) return 0;
        reach += (size - 1) * stride;
    }
    return static_cast<uint64_t>(reach) * aoti_torch_dtype_element_size(dtype);
}

void note(AtenTensorHandle tensor, const void* address) {
    if (const uint64_t bytes = reach_of(tensor)) note_buffer(reinterpret_cast<uint64_t>(address), bytes);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void emulator_connect(Launch launch, Buffer buffer) {
    run_kernel = launch;
    note_buffer = buffer;
}

void emulator_begin() {
    asked_device = false;
    note_buffer(0, 0);
}

// The stream that kernels belong on: not CUDA's default one.
cudaStream_t emulator_stream() { return reinterpret_cast<cudaStream_t>(&stream_of_torch); }

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

// Outputs and workspaces hold no zeros that nobody wrote: NaN, or -1.
AOTITorchError __real_aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t,
                                               int32_t, AtenTensorHandle*);
AOTITorchError __wrap_aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                               int32_t dtype, int32_t device_type, int32_t device_index,
                                               AtenTensorHandle* tensor) {
    const AOTITorchError error =
        __real_aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, tensor);
    void* data = nullptr;
    if (!error && !aoti_torch_get_data_ptr(*tensor, &data)) std::memset(data, 0xff, reach_of(*tensor));
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
                               cudaStream_t stream) {
    return launch(kernel, grid, block, args, shared, stream, false);
}

// ---- what csrc/cuda calls ---------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorInvalidResourceHandle) return "not torch's current stream";
    return error == cudaErrorInvalidValue ? "invalid value" : "the emulated kernel failed";
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize ||
        static_cast<uint32_t>(value) > most_shared())
        return cudaErrorInvalidValue;
    kernels().at(host).asked = static_cast<uint32_t>(value);
    return cudaSuccess;
}

// A block of each SM fits at least.
cudaError_t cudaLaunchCooperativeKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t stream) {
    if (grid.x * grid.y * grid.z > kSms) return cudaErrorCooperativeLaunchTooLarge;
    return launch(host, grid, block, args, shared, stream, true);
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
    if (stream != emulator_stream()) return cudaErrorInvalidResourceHandle;
    std::memset(p, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = kSms;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            asked_device = true;
            *value = kMost;
            return cudaSuccess;
        default:
            return cudaErrorInvalidValue;
    }
}

}  // extern "C"
