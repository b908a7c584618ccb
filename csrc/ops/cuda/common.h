// What every operator file for CUDA shares, beside what it shares with the CPU's.
//
// Index tensors are not read here, nothing waits for the device, and memory comes from torch's allocator
// alone, so every operator can be captured in a CUDA graph.
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
// Behind USE_CUDA in torch's header.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace tts::ops {

#if defined(TTS_EMULATED)

struct OnDevice {
    explicit OnDevice(const Tensor&) { emulator_begin(); }
    cudaStream_t stream() const { return emulator_stream(); }
};

#else

// Makes a tensor's device the current one as long as it lives; arguments on another one are refused.
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
