// The common part of every operator file: short names for torch's stable ABI, and the checks.
//
// A failed check throws a bare message. The Python function then repeats the checks slowly, and raises the
// error that names the argument (tts_kernels/checks.py). So a call that succeeds only pays for the checks
// here.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "integers.h"
#include "kernels.h"
#include "parallel.h"

namespace tts::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void require(bool condition, const char* what) {
    if (!condition) throw std::runtime_error(what);
}

// ---- the boundary to torch --------------------------------------------------------------------------------

// Runs a kernel. If it fails, returns false and its message. Not inlined, so that its caller has nothing to
// unwind.
using BoxedKernel = void (*)(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);
[[gnu::noinline]] inline bool ran(BoxedKernel kernel, StableIValue* stack, uint64_t num_args,
                                  uint64_t num_outputs, char (&message)[256]) noexcept {
    try {
        kernel(stack, num_args, num_outputs);
        return true;
    } catch (const std::exception& error) {
        std::snprintf(message, sizeof message, "%s", error.what());
    } catch (...) {
        std::snprintf(message, sizeof message, "unknown error");
    }
    return false;
}

// A kernel in the form in which torch calls it. None of our exceptions leaves the library, because torch may
// use another C++ runtime (a wheel includes libc++) and then cannot catch them. Instead torch throws, through
// a frame without cleanups.
template <BoxedKernel kernel>
void guarded(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
    char message[256];
    if (!ran(kernel, stack, num_args, num_outputs, message)) aoti_torch_check(false, "", "", 0, message);
}

#define TTS_BOX(function) (&tts::ops::guarded<&TORCH_BOX(function)>)

// ---- the device -------------------------------------------------------------------------------------------

// Whether a tensor is on the device of this library's kernels, and whether index tensors are read and checked
// there. (Values on a GPU are not, except in Python under tk.debug_checks.) csrc/ops/cuda/common.h makes the
// device of an op's first tensor the current one.
#if defined(TTS_CUDA)
inline constexpr bool kReadable = false;

inline bool is_here(const Tensor& t) {
    return t.is_cuda() && t.get_device_index() == torch::stable::accelerator::getCurrentDeviceIndex();
}
#else
#if defined(TTS_EMULATED)  // a GPU's operators on CPU tensors (tests/gpu_emulator)
inline constexpr bool kReadable = false;
#else
inline constexpr bool kReadable = true;
#endif

inline bool is_here(const Tensor& t) { return t.is_cpu(); }
#endif

// ---- tensors to plain pointers ----------------------------------------------------------------------------

inline bool is_float(const Tensor& t) {
    const ScalarType s = t.scalar_type();
    return s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Half;
}

inline DType dtype(const Tensor& t) {
    require(is_here(t) && is_float(t), "float tensor");
    if (t.scalar_type() == ScalarType::Float) return DType::f32;
    return t.scalar_type() == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
}

// A contiguous float tensor as an array.
inline FloatArray floats(const Tensor& t) {
    require(t.is_contiguous(), "contiguous");
    return {t.const_data_ptr(), dtype(t)};
}

inline FloatArray floats(const std::optional<Tensor>& t) {
    return t ? floats(*t) : FloatArray{nullptr, DType::f32};
}

inline const float* float32(const Tensor& t) {
    require(is_here(t) && t.is_contiguous() && t.scalar_type() == ScalarType::Float, "float32 tensor");
    return static_cast<const float*>(t.const_data_ptr());
}

inline const float* float32(const std::optional<Tensor>& t) { return t ? float32(*t) : nullptr; }

// An int32 or int64 vector. The caller must keep `dense(t)` alive.
inline IndexArray indices(const Tensor& t) {
    const bool is_int64 = t.scalar_type() == ScalarType::Long;
    require(
        is_here(t) && t.dim() == 1 && t.is_contiguous() && (is_int64 || t.scalar_type() == ScalarType::Int),
        "index vector");
    return {t.const_data_ptr(), is_int64};
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}

// A matrix with contiguous rows. There may be gaps between rows.
inline Tensor dense_rows(const Tensor& t) {
    require(t.dim() == 2, "matrix");
    return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t);
}

template <class T>
T* data(Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
}

[[noreturn]] inline void out_of_memory(int64_t elements, std::initializer_list<int64_t> shape) {
    std::string sizes;
    for (const int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    throw std::runtime_error("out of memory: no room for " + std::to_string(elements) + " elements, [" +
                             sizes + "]");
}

// A new contiguous tensor on the device of `like`. Directly from the C interface: stable::new_empty needs a
// lookup by name and a boxed call, a microsecond that matters for small ops.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
    constexpr size_t kMaxDims = 4;
    require(shape.size() <= kMaxDims, "dimensions");
    int64_t strides[kMaxDims], step = 1;
    for (size_t i = shape.size(); i-- > 0;) {
        strides[i] = step;
        step *= shape.begin()[i];
    }
    int32_t device_type = 0, device_index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
    const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle handle = nullptr;
    if (aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides, type,
                                 device_type, device_index, &handle) != TORCH_SUCCESS) {
        out_of_memory(step, shape);
    }
    return Tensor(handle);
}

// The number of rows of `width` elements that justify a thread of their own, in an op that reads each element
// once or twice.
inline int64_t row_grain(int64_t width) { return 1 + (1 << 15) / (width + 1); }

// The aggregate with this name.
inline Aggregate aggregate(const std::string& how) {
    static constexpr const char* names[] = {"last", "min", "prod", "mean", "max", "sum"};
    for (int i = 0; i < 6; ++i) {
        if (how == names[i]) return static_cast<Aggregate>(i);
    }
    throw std::runtime_error("how");
}

// ---- checks of values -------------------------------------------------------------------------------------

// Requires that every value is in [low, high).
inline void require_range(IndexArray values, int64_t count, int64_t low, int64_t high) {
    if constexpr (!kReadable) return;
    bool good = true;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t v = at(values, i);
        good &= v >= low && v < high;
    }
    require(good, "index out of range");
}

// Requires that indptr [n + 1] rises from 0 to `total`.
inline void require_indptr(IndexArray indptr, int64_t entries, int64_t total) {
    require(entries >= 1, "indptr");
    if constexpr (!kReadable) return;
    bool good = at(indptr, 0) == 0 && at(indptr, entries - 1) == total;
    for (int64_t i = 1; i < entries; ++i) good &= at(indptr, i) >= at(indptr, i - 1);
    require(good, "indptr");
}

}  // namespace tts::ops
