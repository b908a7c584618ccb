// Copies rows of bytes, in the widest units that all addresses allow.
#pragma once

#include <cstdint>

namespace tts::cuda {

// `rows` rows of `units` units each; strides in bytes.
struct RowCopy {
    char* to;
    const char* from;
    int64_t to_stride, from_stride;
    int rows, units;
};

// Copies with all threads of a block.
template <class Unit>
__device__ void copy_rows(const RowCopy& copy) {
    constexpr int kTurns = sizeof(Unit) == 1 ? 1 : 4;  // at once; with four of 1 byte nvcc spills for sm_80
#pragma unroll kTurns
    for (int i = static_cast<int>(threadIdx.x); i < copy.rows * copy.units;
         i += static_cast<int>(blockDim.x)) {
        const int row = copy.rows == 1 ? 0 : i / copy.units, unit = i - row * copy.units;
        reinterpret_cast<Unit*>(copy.to + row * copy.to_stride)[unit] =
            reinterpret_cast<const Unit*>(copy.from + row * copy.from_stride)[unit];
    }
}

}  // namespace tts::cuda
