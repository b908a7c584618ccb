// aggregate_steps: one number for each candidate from the scores of its steps.
//
//   scores [S], candidate c owns scores[indptr[c] : indptr[c + 1]]  ->  out [C]
//
// One thread for each candidate: chains have about ten steps, and their sums must be computed in order.
#include "aggregate.cuh"
#include "aggregate_steps.h"
#include "block_size.cuh"
#include "launch.cuh"

namespace tts::cuda {
namespace {

constexpr int kThreads = block_size(128);

__global__ __launch_bounds__(kThreads) void aggregate_kernel(AggregateStepsArgs args, int64_t candidates) {
    const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (c < candidates) args.out[c] = aggregate(args, c);
}

}  // namespace

void aggregate_steps(const AggregateStepsArgs& args, int64_t candidates, cudaStream_t stream) {
    launch(aggregate_kernel, divide_up(candidates, kThreads), kThreads, 0, stream, args, candidates);
}

}  // namespace tts::cuda
