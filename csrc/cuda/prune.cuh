// The k best candidates of one group, by one block, in the order of total_order.h.
//
// Up to 256 candidates (kPruneThreads), one for each thread, are kept in shared memory as `ranked` numbers,
// which are all different. The place of each is the number of candidates that beat it: this needs no sort and
// only one barrier. For a larger group, radix selection on the 32-bit keys first finds the k best (four
// passes of a byte each, then one that collects in candidate order). Up to 256 of these are placed by
// counting, too; more are sorted in the output row.
#pragma once

#include "args/prune.h"
#include "block_size.cuh"
#include "reduce.cuh"
#include "total_order.h"
#include "vector.cuh"

namespace tts::cuda {

inline constexpr int kPruneThreads = block_size(256), kBins = 256;

struct PruneShared {
    alignas(16) int64_t ranks[kPruneThreads];
    uint32_t bins[kBins];
    uint32_t warps[kPruneThreads / kWarp];
    uint32_t bin, above;
};

// The sum of `count` over the block's threads with lower numbers; `total`: over all threads.
__device__ inline uint32_t sum_before(uint32_t count, uint32_t* warps, uint32_t& total) {
    uint32_t sum = count;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const uint32_t lower = __shfl_up_sync(kAllLanes, sum, step);
        if (lane() >= step) sum += lower;
    }
    __syncthreads();  // the last call's sums have been read
    if (lane() == kWarp - 1) warps[warp()] = sum;
    __syncthreads();
    sum -= count;
    total = 0;
#pragma unroll
    for (int w = 0; w < kPruneThreads / kWarp; ++w) {
        if (w < warp()) sum += warps[w];
        total += warps[w];
    }
    return sum;
}

// A key as an unsigned number with the same order.
__device__ inline uint32_t radix(int32_t key) { return static_cast<uint32_t>(key) ^ 0x80000000u; }

// The k-th largest of n keys (1 <= k <= n), and how many keys are greater.
template <class T>
__device__ uint32_t kth_largest(const T* scores, int64_t n, uint32_t k, PruneShared& shared,
                                uint32_t& greater) {
    uint32_t prefix = 0, total;
    greater = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < kBins; i += kPruneThreads) shared.bins[i] = 0;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < n; i += kPruneThreads) {
            const uint32_t key = radix(order_key(to_float(scores[i])));
            if (((key ^ prefix) >> shift) < kBins) atomicAdd(&shared.bins[(key >> shift) & (kBins - 1)], 1u);
        }
        __syncthreads();
        constexpr int kEach = kBins / kPruneThreads;
        const int first = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;  // in descending order of keys
        uint32_t count = 0;
#pragma unroll
        for (int i = 0; i < kEach; ++i) count += shared.bins[first - i];
        uint32_t above = greater + sum_before(count, shared.warps, total);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const uint32_t of_bin = shared.bins[first - i];
            if (above < k && k <= above + of_bin) {
                shared.bin = static_cast<uint32_t>(first - i);
                shared.above = above;
            }
            above += of_bin;
        }
        __syncthreads();
        prefix |= shared.bin << shift;
        greater = shared.above;
    }
    return prefix;
}

// Writes the ranks of the k best of n to `list`, in candidate order.
template <class T>
__device__ void collect(const T* scores, int64_t n, uint32_t k, PruneShared& shared, int64_t* list) {
    uint32_t greater;
    const uint32_t cut = kth_largest(scores, n, k, shared, greater);
    uint32_t ties_left = k - greater, size = 0;
    for (int64_t first = 0; first < n; first += kPruneThreads) {
        const int64_t i = first + threadIdx.x;
        const int32_t key = i < n ? order_key(to_float(scores[i])) : kNaNKey;
        const bool is_tie = i < n && radix(key) == cut;
        uint32_t ties, kept;
        const bool tie_stays = sum_before(is_tie, shared.warps, ties) < ties_left && is_tie;
        const bool stays = tie_stays || (i < n && radix(key) > cut);
        const uint32_t place = sum_before(stays, shared.warps, kept);
        if (stays) list[size + place] = ranked(key, static_cast<uint32_t>(i));
        ties_left -= ties < ties_left ? ties : ties_left;
        size += kept;
    }
    __syncthreads();
}

// Sorts n numbers by one block, in descending order. Every comparison of this bitonic network puts the
// greater number first, so no memory is needed for the padding beyond n.
__device__ inline void sort_ranks(int64_t* x, int64_t n) {
    for (int64_t size = 2; size < 2 * n; size *= 2) {
        for (int64_t step = size / 2; step > 0; step /= 2) {
            for (int64_t t = threadIdx.x; t < n; t += kPruneThreads) {
                const int64_t other = step == size / 2 ? t ^ (size - 1) : t ^ step;
                if (other > t && other < n && x[other] > x[t]) {
                    const int64_t swap = x[t];
                    x[t] = x[other];
                    x[other] = swap;
                }
            }
            __syncthreads();
        }
    }
}

// Writes the k best of up to 256 ranks as indices from `first` on. Each thread has one rank, INT64_MIN if it
// has no candidate.
__device__ inline void place(int64_t rank, int n, uint32_t k, int64_t first, bool keep_order,
                             PruneShared& shared, int64_t* out) {
    shared.ranks[threadIdx.x] = rank;
    __syncthreads();
    const longlong2* pairs = reinterpret_cast<const longlong2*>(shared.ranks);
    uint32_t better = 0, total;
    for (int j = 0; j < (n + 1) / 2; ++j) better += (pairs[j].x > rank) + (pairs[j].y > rank);
    const bool stays = static_cast<int>(threadIdx.x) < n && better < k;
    if (keep_order) better = sum_before(stays, shared.warps, total);
    if (stays) out[better] = first + ranked_index(rank);
}

// Prunes group g. The block must be able to see its scores.
template <class T>
__device__ void prune_group(const PruneArgs& args, int64_t g, PruneShared& shared) {
    const int64_t first = at(args.indptr, g), n = at(args.indptr, g + 1) - first;
    const T* scores = static_cast<const T*>(args.scores.data) + first;
    const int64_t wanted = args.k.data ? min(max(at(args.k, g), int64_t{0}), args.width) : args.width;
    const uint32_t k = static_cast<uint32_t>(min(wanted, n)), i = threadIdx.x;
    int64_t* out = args.indices + g * args.width;
    for (int64_t j = k + i; j < args.width; j += kPruneThreads) out[j] = -1;
    if (i == 0) args.counts[g] = static_cast<int32_t>(k);
    if (k == 0) return;

    if (n <= kPruneThreads) {
        const int64_t rank = i < n ? ranked(order_key(to_float(scores[i])), i) : INT64_MIN;
        place(rank, static_cast<int>(n), k, first, args.keep_order, shared, out);
    } else if (k <= kPruneThreads) {
        collect(scores, n, k, shared, shared.ranks);
        const int64_t rank = i < k ? shared.ranks[i] : INT64_MIN;  // this thread finds its place
        place(rank, static_cast<int>(k), k, first, args.keep_order, shared, out);
    } else {
        collect(scores, n, k, shared, out);
        if (!args.keep_order) sort_ranks(out, k);
        for (uint32_t j = i; j < k; j += kPruneThreads) out[j] = first + ranked_index(out[j]);
    }
}

}  // namespace tts::cuda
