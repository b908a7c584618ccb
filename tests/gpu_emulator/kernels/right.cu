// Kernels that are right: the emulator must run them, in any order of threads and blocks, without a
// complaint.
#include <cuda_bf16.h>

extern "C" __global__ void softmax(const float* x, float* y, int n) {  // x, y [gridDim.x, n]
    extern __shared__ float row[];
    __shared__ float partial[32];
    const int t = threadIdx.x, warp = t / 32, warps = blockDim.x / 32;
    float top = -INFINITY;
    for (int i = t; i < n; i += blockDim.x) {
        row[i] = x[blockIdx.x * n + i];
        top = fmaxf(top, row[i]);
    }
    for (int o = 16; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
    if (t % 32 == 0) partial[warp] = top;
    __syncthreads();
    for (int i = 0; i < warps; ++i) top = fmaxf(top, partial[i]);
    __syncthreads();
    float sum = 0.0f;
    for (int i = t; i < n; i += blockDim.x) sum += row[i] = __expf(row[i] - top);
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    if (t % 32 == 0) partial[warp] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < warps; ++i) sum += partial[i];
    for (int i = t; i < n; i += blockDim.x) y[blockIdx.x * n + i] = row[i] / sum;
}

// One query over n keys of head size 64: a warp for each key, then the block sums up.
extern "C" __global__ void decode(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v,
                                  float* out,
                                  int n) {  // q [64], k and v [n, 64], out [64]
    extern __shared__ float score[];
    const int t = threadIdx.x, lane = t % 32;
    const __nv_bfloat162 query = reinterpret_cast<const __nv_bfloat162*>(q)[lane];
    for (int i = t / 32; i < n; i += blockDim.x / 32) {
        const float2 a = __bfloat1622float2(query);
        const float2 b = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162*>(k + 64 * i)[lane]);
        float dot = a.x * b.x + a.y * b.y;
        for (int o = 16; o; o >>= 1) dot += __shfl_down_sync(~0u, dot, o);
        if (lane == 0) score[i] = dot * 0.125f;
    }
    __syncthreads();
    float top = -INFINITY, sum = 0.0f, acc = 0.0f;
    for (int i = 0; i < n; ++i) top = fmaxf(top, score[i]);
    for (int i = 0; i < n; ++i) {
        const float p = exp2f((score[i] - top) * 1.44269504f);
        sum += p;
        if (t < 64) acc += p * __bfloat162float(v[64 * i + t]);
    }
    if (t < 64) out[t] = acc / sum;
}

// Bitonic sort of 64-bit keys (order-preserving score, index below it): the k best of blockDim.x scores.
extern "C" __global__ void topk(const float* scores, int* best, int k) {  // scores [blockDim.x], best [k]
    __shared__ unsigned long long keys[1024];
    const unsigned t = threadIdx.x, n = blockDim.x;
    const unsigned bits = __float_as_uint(scores[t]);
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    keys[t] = static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - t);
    for (unsigned width = 2; width <= n; width *= 2)
        for (unsigned step = width / 2; step; step /= 2) {
            __syncthreads();
            const unsigned other = t ^ step;
            if (other > t && (keys[t] < keys[other]) == ((t & width) == 0)) {
                const unsigned long long swap = keys[t];
                keys[t] = keys[other];
                keys[other] = swap;
            }
        }
    __syncthreads();
    if (t < k) best[t] = static_cast<int>(0xffffffffu - static_cast<unsigned>(keys[t]));
}

// The last block to finish adds up what all have written.
extern "C" __global__ void ticket_sum(const float* x, float* partial, unsigned* ticket, float* total) {
    __shared__ bool last;
    float sum = x[blockIdx.x * 32 + threadIdx.x];
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        __threadfence();
        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last || threadIdx.x) return;
    sum = 0.0f;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *total = sum;
}

extern "C" __global__ void histogram(const int* x, unsigned* bins, int n) {  // bins [64]
    __shared__ unsigned local[64];
    if (threadIdx.x < 64) local[threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        atomicAdd(&local[x[i] & 63], 1u);
    __syncthreads();
    if (threadIdx.x < 64) atomicAdd(&bins[threadIdx.x], local[threadIdx.x]);
}

extern "C" __global__ void warp_scan(const int* x, int* y) {  // inclusive, 32 each
    __shared__ int row[32];
    row[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    for (int o = 1; o < 32; o *= 2) {
        const int add = threadIdx.x >= o ? row[threadIdx.x - o] : 0;
        __syncwarp();
        row[threadIdx.x] += add;
        __syncwarp();
    }
    y[threadIdx.x] = row[threadIdx.x];
}

// Rows of n floats by cp.async, two stages deep; what a row lacks to a multiple of 128 is zeros. x
// [gridDim.x, stride], y [gridDim.x, pieces * 128], stride a multiple of 4.
extern "C" __global__ void staged_rows(const float* x, float* y, int n, int stride) {
    __shared__ float4 ring[2][32];
    const int t = threadIdx.x, pieces = (n + 127) / 128;
    const float* row = x + blockIdx.x * stride;
    auto fetch = [&](int piece) {
        const int first = piece * 128 + t * 4, bytes = min(max(4 * (n - first), 0), 16);
        const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(&ring[piece % 2][t]));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to),
                     "l"(bytes ? row + first : row), "r"(bytes)
                     : "memory");
        asm volatile("cp.async.commit_group;");
    };
    fetch(0);
    for (int piece = 0; piece < pieces; ++piece) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
        if (piece + 1 < pieces) fetch(piece + 1);
        reinterpret_cast<float4*>(y)[(blockIdx.x * pieces + piece) * 32 + 31 - t] = ring[piece % 2][31 - t];
    }
}
