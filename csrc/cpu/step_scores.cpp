// step_scores: the score of a process reward model at the last token of each step.
//
//   out[s] = act(w . norm(hidden[positions[s]]) + b)
//
// A softmax over two logits is the sigmoid of their difference. So a pair of label rows becomes one row w,
// and a step costs one dot product of length H instead of a row of vocabulary logits. RMSNorm needs no extra
// pass: w . (x g / rms) = (w g . x) / rms, and the sum of squares is computed in the same loop. Bytes: S rows
// of H elements and one row of the head.
//
// With a hidden layer, z = w . relu(W1 norm(x) + b1) + b: the rows are gathered, then W1 [H1, H] is read once
// for all steps, in blocks of 48 rows. A block's units are folded into one number for each step, so [S, H1]
// is never stored.
#include "step_scores.h"

#include "integers.h"
#include "matmul_nt.h"
#include "vec.h"
#include "vec_row.h"

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
float logit(const T* x, const StepScoresArgs& args) {
    const HeadArgs& head = args.head;
    const float bias = head.bias ? *head.bias : 0.0f;
    if (!head.norm_weight.data) return dot(x, head.weight, args.width) + bias;
    return visit(head.norm_weight, [&](const auto* g) {
        const Sums sums = normed_sums(x, head.weight, g, args.width);
        return sums.dot * rms_factor(sums.squares, args.width, head.eps) + bias;
    });
}

// ---- the hidden layer -------------------------------------------------------------------------------------

template <class T>
void norm_row(const T* x, float* out, const StepScoresArgs& args) {
    const Vec factor = Vec::all(rms_factor(x, args.width, args.head.eps));
    visit(args.head.norm_weight, [&](const auto* g) {
        for_vectors(args.width,
                    [&](int64_t i, int n) { store(load(x + i, n) * factor * load(g + i, n), out + i, n); });
    });
}

template <class T>
void widen_row(const T* x, float* out, int64_t n) {
    for_vectors(n, [&](int64_t i, int left) { store(load(x + i, left), out + i, left); });
}

// sum over n hidden units of w[j] relu(z[j] + b1[j]). NaN stays NaN.
template <class T>
float fold_units(const float* z, const T* b1, const float* w, int n) {
    constexpr int W = Vec::width;
    Vec sum = Vec::zero();
    for (int j = 0; j < n; j += W) {
        const int lanes = n - j < W ? n - j : W;
        Vec v = Vec::load(z + j, lanes);
        if (b1) v = v + Vec::load(b1 + j, lanes);
        sum = fma(max(Vec::zero(), v), Vec::load(w + j, lanes), sum);
    }
    return reduce_add(sum);
}

constexpr int kStepBlock = 64;  // rows of logits [kStepBlock, kHiddenBlock] on the stack

template <class A, class B>
void hidden_block(const StepScoresArgs& args, const A* rows, const B* w1, int64_t block) {
    const HeadArgs& head = args.head;
    const int64_t first = block * kHiddenBlock, rest = head.hidden_width - first;
    const int units = static_cast<int>(rest < kHiddenBlock ? rest : kHiddenBlock);
    float z[kStepBlock * kHiddenBlock];
    for (int64_t s = 0; s < args.steps; s += kStepBlock) {
        const int64_t steps = args.steps - s < kStepBlock ? args.steps - s : kStepBlock;
        matmul_nt(rows + s * args.width, args.width, steps, w1 + first * args.width, args.width, units,
                  args.width, z, kHiddenBlock);
        visit(head.b1, [&](const auto* b1) {
            for (int64_t i = 0; i < steps; ++i) {
                args.partials[block * args.steps + s + i] =
                    fold_units(z + i * kHiddenBlock, b1 ? b1 + first : b1, head.weight + first, units);
            }
        });
    }
}

}  // namespace

void step_scores(const StepScoresArgs& args, int64_t begin, int64_t end) {
    visit(args.hidden, [&](const auto* hidden) {
        for (int64_t s = begin; s < end; ++s) {
            const auto* row = hidden + at(args.positions, s) * args.stride;
            args.out[s] = activate(logit(row, args), args.head.sigmoid);
        }
    });
}

void step_scores_gather(const StepScoresArgs& args, int64_t begin, int64_t end) {
    const int64_t n = args.width;
    visit(args.hidden, [&](const auto* hidden) {
        for (int64_t s = begin; s < end; ++s) {
            const auto* row = hidden + at(args.positions, s) * args.stride;
            if (args.bf16_rows) {
                __builtin_memcpy(static_cast<bf16*>(args.rows) + s * n, row,
                                 static_cast<uint64_t>(n) * sizeof(bf16));
            } else if (args.head.norm_weight.data) {
                norm_row(row, static_cast<float*>(args.rows) + s * n, args);
            } else {
                widen_row(row, static_cast<float*>(args.rows) + s * n, n);
            }
        }
    });
}

void step_scores_hidden(const StepScoresArgs& args, int64_t begin, int64_t end) {
    const FloatArray rows = {args.rows, args.bf16_rows ? DType::bf16 : DType::f32};
    visit_operands(rows, args.head.w1, [&](const auto* a, const auto* w1) {
        for (int64_t block = begin; block < end; ++block) hidden_block(args, a, w1, block);
    });
}

void step_scores_finish(const StepScoresArgs& args, int64_t begin, int64_t end) {
    const int64_t blocks = divide_up(args.head.hidden_width, kHiddenBlock);
    for (int64_t s = begin; s < end; ++s) {
        float z = args.head.bias ? *args.head.bias : 0.0f;
        for (int64_t b = 0; b < blocks; ++b) z += args.partials[b * args.steps + s];
        args.out[s] = activate(z, args.head.sigmoid);
    }
}

TTS_END_ISA
