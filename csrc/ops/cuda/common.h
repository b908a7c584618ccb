// The common part of every operator file for CUDA, besides what the CPU's files use, too.
//
// Index tensors are not read here, nothing waits for the device, and memory comes only from torch's
// allocator. So every operator can be captured in a CUDA graph.
#pragma once

#include "../../cuda/stream.h"
#include "../common.h"

// The emulated library (tests/gpu_emulator) runs the same operators and kernels on CPU tensors, without a
// device.
#if defined(TTS_EMULATED)
#define TTS_CUDA_KEY CPU
extern "C" void emulator_begin();
extern "C" cudaStream_t emulator_stream();
#else
#define TTS_CUDA_KEY CUDA
// In torch's header this is behind USE_CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace tts::ops {

#if defined(TTS_EMULATED)

struct OnDevice {
    explicit OnDevice(const Tensor&) { emulator_begin(); }
    cudaStream_t stream() const { return emulator_stream(); }
};

#else

// Makes a tensor's device the current one during its lifetime. Arguments on other devices are refused.
class OnDevice {
  public:
    explicit OnDevice(const Tensor& t) : guard_(device_of(t)) {}

    cudaStream_t stream() const {
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(
            aoti_torch_get_current_cuda_stream(torch::stable::accelerator::getCurrentDeviceIndex(), &stream));
        return static_cast<cudaStream_t>(stream);
    }

  private:
    static int32_t device_of(const Tensor& t) {
        require(t.is_cuda(), "CUDA tensor");
        return t.get_device_index();
    }

    torch::stable::accelerator::DeviceGuard guard_;
};

#endif

}  // namespace tts::ops
