// Element types of a kernel's inputs, as plain data.
#pragma once

#include <cstdint>

#include "isa.h"

namespace tts {

enum class DType : int32_t { f32, bf16, f16 };

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

// A floating-point array of any of the three types.
struct FloatArray {
    const void* data;
    DType dtype;
};

// An index tensor: int32 or int64, contiguous.
struct IndexArray {
    const void* data;
    bool is_int64;
};

}  // namespace tts

TTS_BEGIN_ISA

TTS_HD inline int64_t at(IndexArray a, int64_t i) {
    return a.is_int64 ? static_cast<const int64_t*>(a.data)[i] : static_cast<const int32_t*>(a.data)[i];
}

// Calls f with a null pointer of the element type: `dispatch(dtype, [&](auto* t) { using T = ...; })`.
template <class F>
inline auto dispatch(DType dtype, F f) {
    switch (dtype) {
        case DType::bf16:
            return f(static_cast<bf16*>(nullptr));
        case DType::f16:
            return f(static_cast<f16*>(nullptr));
        default:
            return f(static_cast<float*>(nullptr));
    }
}

// Calls f with the array's pointer in the array's type.
template <class F>
inline auto visit(FloatArray a, F f) {
    return dispatch(a.dtype,
                    [&](auto* type) { return f(static_cast<decltype(type)>(const_cast<void*>(a.data))); });
}

TTS_END_ISA
