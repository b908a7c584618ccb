// float8_e4m3fn by integer arithmetic: GPUs have conversion instructions only from sm_89 on.
#pragma once

#include <cstdint>

namespace tts::cuda {

inline constexpr float kMostE4m3 = 448.0f;

// The byte nearest to x; ties go to the even one. Above 448 it is that of 448.
__device__ inline uint32_t to_e4m3(float x) {
    constexpr uint32_t kNaN = 0x7f;
    const float size = fminf(fabsf(x), kMostE4m3);
    const uint32_t bits = __float_as_uint(size), odd = bits >> 20 & 1;
    const uint32_t normal =
        ((bits + 0x7ffffu + odd) >> 20) - (120u << 3);  // 3 of 23 mantissa bits; the bias is 7 instead of 127
    const auto small = static_cast<uint32_t>(__float2int_rn(size * 512.0f));  // steps of 2**-9
    const uint32_t code = x != x ? kNaN : size < 0x1p-6f ? small : normal;
    return (__float_as_uint(x) >> 24 & 0x80u) | code;
}

// The number of the highest byte of a word, exactly. Read as the upper bits of a float, the byte has 2**-120
// times its value.
__device__ inline float of_e4m3(uint32_t word) {
    const auto shifted = static_cast<uint32_t>(static_cast<int32_t>(word) >> 4);
    const float x = __uint_as_float(shifted & 0x87f00000u) * 0x1p120f;
    return fabsf(x) > kMostE4m3 ? __uint_as_float(0x7fc00000u) : x;  // 480 would be the byte of NaN
}

}  // namespace tts::cuda
