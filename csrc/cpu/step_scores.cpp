// step_scores: the score of a process reward model at the last token of each step.
//
//   out[s] = act(w . norm(hidden[positions[s]]) + b)
//
// A softmax over two logits is the sigmoid of their difference, so a pair of label rows is one row w, and a
// step costs one dot product of length H instead of a row of vocabulary logits. RMSNorm needs no pass of its
// own: w . (x g / rms) = (w g . x) / rms, and the sum of squares is taken in the same loop.
// Bytes: S rows of H elements and one row of the head.
#include "step_scores.h"

#include "vec.h"

TTS_BEGIN_ISA

namespace {

float activate(float z, bool sigmoid) { return sigmoid ? 1.0f / (1.0f + exp(-z)) : z; }

// w . x and x . x in one pass.
struct Sums {
    float dot, squares;
};

template <class T, class G>
Sums normed_sums(const T* x, const float* w, const G* g, int64_t n) {
    constexpr int W = Vec::width;
    Vec d0 = Vec::zero(), d1 = d0, q0 = d0, q1 = d0;
    const auto step = [&](int64_t i, Vec& d, Vec& q) {
        const Vec v = Vec::load(x + i);
        d = fma(v * Vec::load(g + i), Vec::load(w + i), d);
        q = fma(v, v, q);
    };
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        step(i, d0, q0);
        step(i + W, d1, q1);
    }
    for (; i + W <= n; i += W) step(i, d0, q0);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        const Vec v = Vec::load(x + i, rest);
        d1 = fma(v * Vec::load(g + i, rest), Vec::load(w + i, rest), d1);
        q1 = fma(v, v, q1);
    }
    return {reduce_add(d0 + d1), reduce_add(q0 + q1)};
}

template <class T>
float logit(const T* x, const HeadArgs& head, int64_t width) {
    const float bias = head.bias ? *head.bias : 0.0f;
    if (!head.norm_weight.data) return dot(x, head.weight, width) + bias;
    return dispatch(head.norm_weight.dtype, [&](auto* type) {
        const auto* g = static_cast<decltype(type)>(const_cast<void*>(head.norm_weight.data));
        const Sums sums = normed_sums(x, head.weight, g, width);
        return sums.dot / __builtin_sqrtf(sums.squares / static_cast<float>(width) + head.eps) + bias;
    });
}

}  // namespace

void step_scores(const StepScoresArgs& args, int64_t begin, int64_t end) {
    dispatch(args.hidden.dtype, [&](auto* type) {
        const auto* hidden = static_cast<decltype(type)>(const_cast<void*>(args.hidden.data));
        for (int64_t s = begin; s < end; ++s) {
            const auto* row = hidden + at(args.positions, s) * args.stride;
            args.out[s] = activate(logit(row, args.head, args.width), args.head.sigmoid);
        }
    });
}

TTS_END_ISA
