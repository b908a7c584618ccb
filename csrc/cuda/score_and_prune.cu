// score_and_prune: scores of new steps, aggregates of candidates, the k best of each group, in one launch.
//
// The block of a candidate scores its steps and folds them into its aggregate. The last block of a group to
// finish prunes the group. So as many blocks as candidates read rows, and no launch waits for another. Every
// group has one additional block, so that an empty group is pruned as well. Arrivals are counted from 0: 4 G
// bytes are cleared before the launch.
#include "aggregate.cuh"
#include "launch.cuh"
#include "prune.cuh"
#include "score.cuh"
#include "score_and_prune.h"

namespace tts::cuda {
namespace {

// The group of candidate c: the last group that begins at or before it. A warp tries 32 groups at a time.
__device__ int64_t group_of(IndexArray indptr, int64_t groups, int64_t c) {
    int64_t low = 0, high = groups;
    while (high - low > 1) {
        const int64_t step = divide_up(high - low, kWarp), probe = low + lane() * step;
        const unsigned votes = __ballot_sync(kAllLanes, probe < high && at(indptr, probe) <= c);
        low += (max(__popc(votes), 1) - 1) * step;
        high = min(high, low + step);
    }
    return low;
}

// Whether this block is the last one of its group to arrive. Then all earlier writes of the others can be
// read.
__device__ bool arrives_last(const ScoreAndPruneArgs& args, int64_t group) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        __threadfence();
        const int64_t others = at(args.groups.indptr, group + 1) - at(args.groups.indptr, group);
        last = atomicAdd(&args.arrivals[group], 1u) == static_cast<uint32_t>(others);
        __threadfence();
    }
    __syncthreads();
    return last;
}

template <class Head>
__global__ __launch_bounds__(kPruneThreads, 4) void round_kernel(ScoreAndPruneArgs args, bool vectors) {
    __shared__ PruneShared shared;
    const int64_t c = blockIdx.x;
    int64_t group = c - args.candidate_count;
    if (group < 0) {
        group = group_of(args.groups.indptr, args.group_count, c);
        const int64_t end = at(args.chains.indptr, c + 1);
        for (int64_t s = at(args.chains.indptr, c); s < end; ++s) {
            const float score = Head::template score<kPruneThreads>(args.steps, s, vectors);
            if (threadIdx.x == 0) args.steps.out[s] = score;
        }
        if (threadIdx.x == 0) args.chains.out[c] = aggregate(args.chains, c);
    }
    if (arrives_last(args, group)) prune_group<float>(args.groups, group, shared);
}

}  // namespace

void score_and_prune(const ScoreAndPruneArgs& args, cudaStream_t stream) {
    if (args.group_count == 0) return;
    check(
        cudaMemsetAsync(args.arrivals, 0, static_cast<size_t>(args.group_count) * sizeof(uint32_t), stream));
    if (args.steps.head.w1.data) step_scores_hidden(args.steps, stream);
    dispatch_head(args.steps, [&](auto head) {
        launch(round_kernel<decltype(head)>, args.candidate_count + args.group_count, kPruneThreads, 0,
               stream, args, reads_vectors(args.steps));
    });
}

}  // namespace tts::cuda
