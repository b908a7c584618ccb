// The k likeliest tokens of a row of logits, for `sample`: best first, the lower id first on ties.
//
// One block for each row, after the draw. Each of k rounds finds the best logit below the previous one. A
// logit and its id are combined into one number (`ranked`), so a round is one maximum. By then the row is in
// L2. k is about 20, which costs little compared with a forward.
#pragma once

#include "args/sample.h"
#include "block_size.cuh"
#include "reduce.cuh"
#include "total_order.h"
#include "vector.cuh"

namespace tts::cuda {

inline constexpr int kLikeliestThreads = block_size(512);

template <class T>
__global__ __launch_bounds__(kLikeliestThreads) void likeliest_kernel(SampleArgs args) {
    __shared__ int64_t best_of_warps[kLikeliestThreads / kWarp];
    const int64_t r = blockIdx.x, token = args.tokens[r];
    const T* x = static_cast<const T*>(args.logits.data) + r * args.stride;
    const double own = args.logprobs[r];
    int64_t last = INT64_MAX;
    double drawn = 0.0;
    for (int64_t j = 0; j < args.top; ++j) {
        int64_t best = INT64_MIN;
        for (int64_t i = threadIdx.x; token >= 0 && i < args.vocab; i += kLikeliestThreads) {
            const int64_t rank = ranked(order_key(to_float(x[i])), static_cast<uint32_t>(i));
            if (rank < last && rank > best) best = rank;
        }
        last = reduce_block<kLikeliestThreads>(best, best_of_warps, Max{});
        if (threadIdx.x != 0) continue;
        const int64_t at = r * args.top + j;
        if (token < 0) {
            args.top_ids[at] = -1;
            args.top_logprobs[at] = NAN;
            continue;
        }
        const double value = key_score(ranked_key(last));
        if (j == 0) drawn = value == INFINITY ? value : static_cast<double>(to_float(x[token]));
        args.top_ids[at] = ranked_index(last);  // +inf minus itself is NaN: an equal logit is as likely
        args.top_logprobs[at] = static_cast<float>(value == drawn ? own : value - drawn + own);
    }
}

}  // namespace tts::cuda
