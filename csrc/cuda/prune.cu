// prune: the k best candidates of each group, best first or in candidate order.
//
//   scores [S], group g owns scores[indptr[g] : indptr[g + 1]]  ->  indices [G, K] padded with -1, counts [G]
//
// One block for each group, because there are many small groups. Bytes: a group's scores once if it has up to
// 256 candidates, else five times, of which four are from the cache.
#include "launch.cuh"
#include "prune.cuh"
#include "prune.h"

namespace tts::cuda {
namespace {

template <class T>
__global__ __launch_bounds__(kPruneThreads, 4) void prune_kernel(PruneArgs args) {
    __shared__ PruneShared shared;
    prune_group<T>(args, blockIdx.x, shared);
}

}  // namespace

void prune(const PruneArgs& args, int64_t groups, cudaStream_t stream) {
    dispatch(args.scores.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        launch(prune_kernel<T>, groups, kPruneThreads, 0, stream, args);
    });
}

}  // namespace tts::cuda
