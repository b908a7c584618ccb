// Loops over a row of any length, vector by vector.
#pragma once

#include <cstdint>

#include "isa.h"
#include "vec.h"

TTS_BEGIN_ISA

// Calls f(i, n) for each vector of n elements from i on. The last one may be short.
template <class F>
inline void for_vectors(int64_t count, F f) {
    int64_t i = 0;
    for (; i + Vec::width <= count; i += Vec::width) f(i, Vec::width);
    if (i < count) f(i, static_cast<int>(count - i));
}

template <class T>
inline Vec load(const T* p, int n) {
    return n == Vec::width ? Vec::load(p) : Vec::load(p, n);
}

template <class T>
inline void store(Vec v, T* p, int n) {
    n == Vec::width ? v.store(p) : v.store(p, n);
}

// The factor of an RMSNorm (arXiv 1910.07467): 1 / sqrt(mean(x**2) + eps), from the sum of squares or the
// row.
inline float rms_factor(float squares, int64_t n, float eps) {
    return 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
}
template <class T>
inline float rms_factor(const T* x, int64_t n, float eps) {
    return rms_factor(dot(x, x, n), n, eps);
}

TTS_END_ISA
