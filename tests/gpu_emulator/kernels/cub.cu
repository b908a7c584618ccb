// CUB's block primitives, whose shared memory is reused between barriers and whose warps rely on __syncwarp.
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

constexpr int kThreads = 64, kItems = 2;

extern "C" __global__ void sort_scan_reduce(const unsigned* x, unsigned* sorted, unsigned* scanned,
                                            unsigned* total) {
    using Sort = cub::BlockRadixSort<unsigned, kThreads, kItems>;
    using Scan = cub::BlockScan<unsigned, kThreads>;
    using Reduce = cub::BlockReduce<unsigned, kThreads>;
    __shared__ union {
        typename Sort::TempStorage sort;
        typename Scan::TempStorage scan;
        typename Reduce::TempStorage reduce;
    } storage;
    const int first = threadIdx.x * kItems;
    unsigned items[kItems], sums[kItems];
    for (int i = 0; i < kItems; ++i) items[i] = x[first + i];
    Scan(storage.scan).ExclusiveSum(items, sums);
    for (int i = 0; i < kItems; ++i) scanned[first + i] = sums[i];
    __syncthreads();
    const unsigned sum = Reduce(storage.reduce).Sum(items);
    if (threadIdx.x == 0) *total = sum;
    __syncthreads();
    Sort(storage.sort).Sort(items);
    for (int i = 0; i < kItems; ++i) sorted[first + i] = items[i];
}
