// linear_logprob: log softmax(hidden W^T / temperature)[target] without a row of logits.
//
//   hidden [N, H], W [V, H], targets [N]  ->  max, sum [chunks, N], target logit [N]
//
// The vocabulary is cut into chunks; a chunk is walked in tiles of 48 rows of W, which are read from memory
// once for all rows of hidden. A tile's logits [rows, 48] live on the stack just long enough to be folded
// into the online log-sum-exp of each row (Milakov and Gimelshein, arXiv 1805.02867). The caller merges the
// chunks in order. Bytes: W once. Operations: 2 N H V.
#include "linear_logprob.h"

#include "matmul_nt.h"
#include "vec.h"

TTS_BEGIN_ISA

namespace {

constexpr int kLogitBlock = 48;         // rows of W whose logits are folded at once
constexpr int kRowBlock = 64;           // rows of hidden at a time, fewer if they are long:
constexpr int64_t kRowBytes = 1 << 18;  // they stay in L2, and the tile of W with them

int64_t row_block(int64_t row_bytes) {
    const int64_t fit = kRowBytes / (row_bytes + 1) / kDotRows * kDotRows;
    return fit < kDotRows ? kDotRows : fit > kRowBlock ? kRowBlock : fit;
}

// Folds n <= kLogitBlock logits into the state (max, sum). A row of -inf alone leaves (-inf, 0); NaN and +inf
// end as NaN.
void fold(const float* logits, int n, float scale, float& max_state, float& sum_state) {
    constexpr int W = Vec::width;
    static_assert(kLogitBlock % W == 0);
    float x[kLogitBlock];
    Vec top = Vec::all(max_state);
    for (int i = 0; i < n; i += W) {
        const int rest = n - i;
        Vec v = Vec::all(-kInfinity);
        if (rest >= W) {
            v = Vec::load(logits + i) * Vec::all(scale);
        } else {
            float lanes[W];
            v.store(lanes);
            for (int l = 0; l < rest; ++l) lanes[l] = logits[i + l] * scale;
            v = Vec::load(lanes);
        }
        v.store(x + i);
        top = max(v, top);
    }
    const float peak = reduce_max(top);
    const float shift = peak == -kInfinity ? 0.0f : peak;
    Vec sum = Vec::zero();
    for (int i = 0; i < n; i += W) sum = sum + exp(Vec::load(x + i) - Vec::all(shift));
    sum_state = sum_state * exp(max_state - shift) + reduce_add(sum);
    max_state = peak;
}

template <class A, class B>
void chunk(const LinearLogprobArgs& args, const A* hidden, const B* weight, int64_t index) {
    const int64_t begin = index * kVocabularyChunk;
    const int64_t end =
        begin + kVocabularyChunk < args.vocabulary ? begin + kVocabularyChunk : args.vocabulary;
    const int64_t block = row_block(args.width * static_cast<int64_t>(sizeof(A)));
    float* max_state = args.max + index * args.rows;
    float* sum_state = args.sum + index * args.rows;
    for (int64_t r = 0; r < args.rows; ++r) {
        max_state[r] = -kInfinity;
        sum_state[r] = 0.0f;
    }
    float logits[kRowBlock * kLogitBlock];
    for (int64_t v = begin; v < end; v += kLogitBlock) {
        const int cols = static_cast<int>(end - v < kLogitBlock ? end - v : kLogitBlock);
        for (int64_t first = 0; first < args.rows; first += block) {
            const int64_t rows = args.rows - first < block ? args.rows - first : block;
            matmul_nt(hidden + first * args.hidden_stride, args.hidden_stride, rows,
                      weight + v * args.weight_stride, args.weight_stride, cols, args.width, logits,
                      kLogitBlock);
            for (int64_t r = 0; r < rows; ++r) {
                const float* row = logits + r * kLogitBlock;
                fold(row, cols, args.inv_temperature, max_state[first + r], sum_state[first + r]);
                const int64_t t = at(args.targets, first + r) - v;
                if (t >= 0 && t < cols) args.target[first + r] = row[t] * args.inv_temperature;
            }
        }
    }
}

}  // namespace

void linear_logprob(const LinearLogprobArgs& args, int64_t begin, int64_t end) {
    visit_operands(args.hidden, args.weight, [&](const auto* hidden, const auto* weight) {
        for (int64_t index = begin; index < end; ++index) chunk(args, hidden, weight, index);
    });
}

TTS_END_ISA
