// cooperative_groups as it comes with CUDA: tiles, coalesced groups, reductions, and a barrier of the whole
// grid.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>

namespace cg = cooperative_groups;

extern "C" __global__ void groups(const int* x, int* tiles, int* odd, int* scan) {
    const auto block = cg::this_thread_block();
    const auto tile = cg::tiled_partition<8>(block);
    const int t = threadIdx.x;
    tiles[t] = cg::reduce(tile, x[t], cg::plus<int>());
    scan[t] = cg::inclusive_scan(cg::tiled_partition<32>(block), x[t]);
    odd[t] = -1;
    if (x[t] & 1) {
        const auto group = cg::coalesced_threads();
        odd[t] = group.thread_rank();
        if (group.thread_rank() == 0) odd[t] = 100 + group.size();
    }
    block.sync();
}

extern "C" __global__ void grid_sum(const int* x, int* partial,
                                    int* total) {  // every block adds up all blocks' values
    const auto grid = cg::this_grid();
    if (threadIdx.x == 0) partial[blockIdx.x] = x[blockIdx.x];
    grid.sync();
    int sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    if (threadIdx.x == 0) total[blockIdx.x] = sum;
}
