// swiglu: out = silu(gate) * up, silu(g) = g / (1 + exp(-g)) (arXiv 2002.05202).
//
//   gate_up [T, 2 I]: gate, then up  ->  out [T, I]
#include "swiglu.h"

#include "vec.h"
#include "vec_row.h"

TTS_BEGIN_ISA

void swiglu(const SwigluArgs& args, int64_t begin, int64_t end) {
    dispatch(args.gate_up.dtype, [&]<class T>(T*) {
        for (int64_t t = begin; t < end; ++t) {
            const T* gate = static_cast<const T*>(args.gate_up.data) + t * args.stride;
            const T* up = gate + args.width;
            T* out = static_cast<T*>(args.out) + t * args.width;
            for_vectors(args.width, [&](int64_t i, int n) {
                const Vec g = load(gate + i, n);
                store(g / (Vec::all(1.0f) + exp(Vec::zero() - g)) * load(up + i, n), out + i, n);
            });
        }
    });
}

TTS_END_ISA
