// rms_norm: h = x + residual, normed = h / sqrt(mean(h**2) + eps) * weight, row by row.
//
//   x, residual [T, H], weight [H]  ->  normed, h [T, H]
//
// h is rounded to its type before the norm, so that the result is the same as adding first and norming later.
// A row with a few thousand elements stays in L1 between the two passes, so memory is read and written once.
#include "rms_norm.h"

#include "vec.h"
#include "vec_row.h"

TTS_BEGIN_ISA

void rms_norm(const RmsNormArgs& args, int64_t begin, int64_t end) {
    dispatch(args.x.dtype, [&]<class T>(T*) {
        const T* weight = static_cast<const T*>(args.weight);
        for (int64_t t = begin; t < end; ++t) {
            const T* x = static_cast<const T*>(args.x.data) + t * args.x_stride;
            T* normed = static_cast<T*>(args.normed) + t * args.width;
            if (args.residual) {
                const T* residual = static_cast<const T*>(args.residual) + t * args.residual_stride;
                T* sum = static_cast<T*>(args.sum) + t * args.width;
                for_vectors(args.width, [&](int64_t i, int n) {
                    store(load(x + i, n) + load(residual + i, n), sum + i, n);
                });
                x = sum;
            }
            const Vec factor = Vec::all(rms_factor(x, args.width, args.eps));
            for_vectors(args.width, [&](int64_t i, int n) {
                store(load(x + i, n) * factor * load(weight + i, n), normed + i, n);
            });
        }
    });
}

TTS_END_ISA
