// linear_logprob: log softmax(hidden W^T / temperature)[target], without storing a row of logits.
//
//   hidden [N, H], W [V, H], targets [N]  ->  max, sum [chunks, N], target logit [N]
//
// The vocabulary is cut into chunks. A chunk is processed in tiles of 48 rows of W, which are read from
// memory once for all rows of hidden. A tile's logits [rows, 48] stay on the stack until they are folded into
// the online log-sum-exp of each row (Milakov and Gimelshein, arXiv 1805.02867). The caller merges the chunks
// in order. Bytes: W once. Operations: 2 N H V.
#include "linear_logprob.h"

#include "logit_fold.h"
#include "matmul_nt.h"

TTS_BEGIN_ISA

namespace {

constexpr int kLogitBlock = 48;         // rows of W whose logits are folded at once
constexpr int kRowBlock = 64;           // rows of hidden at a time, fewer if they are long,
constexpr int64_t kRowBytes = 1 << 18;  // so that they stay in L2 together with the tile of W

int64_t row_block(int64_t row_bytes) {
    const int64_t fit = kRowBytes / (row_bytes + 1) / kDotRows * kDotRows;
    return fit < kDotRows ? kDotRows : fit > kRowBlock ? kRowBlock : fit;
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
                fold_logits<kLogitBlock>(row, cols, args.inv_temperature, max_state[first + r],
                                         sum_state[first + r]);
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
