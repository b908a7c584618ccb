// One fault each: the emulator must catch it. The name says what is wrong.

extern "C" __global__ void missing_syncthreads(const float* x, float* y) {
    __shared__ float row[64];
    row[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = row[63 - threadIdx.x];
}

extern "C" __global__ void missing_syncwarp(const int* x, int* y) {
    __shared__ int row[32];
    row[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = row[threadIdx.x ^ 1];
}

extern "C" __global__ void missing_threadfence(const float* x, float* partial, unsigned* ticket,
                                               float* total) {
    partial[blockIdx.x] = x[blockIdx.x];
    if (atomicAdd(ticket, 1u) != gridDim.x - 1) return;
    float sum = 0.0f;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *total = sum;
}

extern "C" __global__ void late_threadfence(const float* x, float* partial, unsigned* ticket, float* total) {
    __threadfence();  // before the write that it should publish
    partial[blockIdx.x] = x[blockIdx.x];
    const bool last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
    if (!last) return;
    float sum = 0.0f;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *total = sum;
}

extern "C" __global__ void missing_threadfence_in_blocks(const float* x, float* partial, unsigned* ticket,
                                                         float* total) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = x[blockIdx.x];
        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x != 0) return;
    float sum = 0.0f;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *total = sum;
}

// The first block's fence comes too early for what its last thread writes.
extern "C" __global__ void missing_barrier_before_a_fence(float* partial, unsigned* ticket, float* total) {
    if (threadIdx.x == blockDim.x - 1) partial[blockIdx.x] = 1.0f;
    __shared__ bool last;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last || threadIdx.x != 0) return;
    float sum = 0.0f;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *total = sum;
}

extern "C" __global__ void shared_out_of_bounds(int* y, int n) {
    __shared__ int row[32];
    __shared__ int neighbour[32];
    neighbour[threadIdx.x] = 1;
    row[threadIdx.x + n] = 2;
    __syncthreads();
    y[threadIdx.x] = row[31 - threadIdx.x] + neighbour[31 - threadIdx.x];
}

extern "C" __global__ void global_out_of_bounds(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x + 1];
}

extern "C" __global__ void misaligned(const char* x, float* y) {
    y[threadIdx.x] = *reinterpret_cast<const float*>(x + 1 + 4 * threadIdx.x);
}

extern "C" __global__ void local_out_of_bounds(int* y, int n) {
    int own[8];
    for (int i = 0; i < n; ++i) own[i] = i * n;
    y[threadIdx.x] = own[threadIdx.x % n];
}

extern "C" __global__ void divergent_barrier(int* y) {
    __shared__ int sum;
    if (threadIdx.x == 0) sum = 0;
    if (threadIdx.x < 16) {
        __syncthreads();
        y[threadIdx.x] = sum;
    }
}

extern "C" __global__ void two_barriers(int* y) {
    if (threadIdx.x < 32) {
        __syncthreads();
        y[threadIdx.x] = 1;
    } else {
        __syncthreads();
        y[threadIdx.x] = 2;
    }
}

extern "C" __global__ void absent_lane(int* y) {
    int value = threadIdx.x;
    if (threadIdx.x < 16) value = __shfl_xor_sync(0xffffffffu, value, 1);
    y[threadIdx.x] = value;
}

extern "C" __global__ void unnamed_lane(int* y) {
    y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 1);
}

extern "C" __global__ void waiting_elsewhere(int* y) {
    int value = threadIdx.x;
    if (threadIdx.x < 16)
        value = __shfl_xor_sync(0xffffffffu, value, 1);
    else
        __syncthreads();
    y[threadIdx.x] = value;
}

extern "C" __global__ void uninitialised_shared(float* y) {
    __shared__ float row[32];
    if (threadIdx.x) row[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = row[31 - threadIdx.x];
}

extern "C" __global__ void two_blocks_one_word(int* y) { y[threadIdx.x] = blockIdx.x; }

extern "C" __global__ void two_threads_one_word(int* y, int distinct) {
    __shared__ int word;
    word = threadIdx.x % 2 * distinct;
    __syncthreads();
    y[threadIdx.x] = word;
}

__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

extern "C" __global__ void cp_async_without_wait(const float4* x, float4* y) {
    __shared__ float4 row[32];
    copy_async(&row[threadIdx.x], &x[threadIdx.x]);
    asm volatile("cp.async.commit_group;");
    __syncthreads();
    y[threadIdx.x] = row[31 - threadIdx.x];
}

extern "C" __global__ void cp_async_one_group_too_few(const float4* x, float4* y) {
    __shared__ float4 row[2][32];
    for (int i = 0; i < 2; ++i) {
        copy_async(&row[i][threadIdx.x], &x[32 * i + threadIdx.x]);
        asm volatile("cp.async.commit_group;");
    }
    asm volatile("cp.async.wait_group 1;");
    __syncthreads();
    y[threadIdx.x] = row[1][31 - threadIdx.x];  // the younger group
}

extern "C" __global__ void cp_async_over_a_reader(const float4* x, float4* y) {
    __shared__ float4 row[32];
    copy_async(&row[threadIdx.x], &x[threadIdx.x]);
    asm volatile("cp.async.wait_all;");
    __syncthreads();
    y[threadIdx.x] = row[31 - threadIdx.x];
    copy_async(&row[threadIdx.x], &x[32 + threadIdx.x]);  // others may still be reading
    asm volatile("cp.async.wait_all;");
    __syncthreads();
    y[32 + threadIdx.x] = row[31 - threadIdx.x];
}

extern "C" __global__ void cp_async_of_another_blocks_write(float4* x, float4* y) {
    __shared__ float4 row[32];
    x[blockIdx.x * 32 + threadIdx.x] = make_float4(1.0f, 2.0f, 3.0f, 4.0f);
    copy_async(&row[threadIdx.x], &x[(blockIdx.x ^ 1) * 32 + threadIdx.x]);
    asm volatile("cp.async.wait_all;");
    __syncthreads();
    y[blockIdx.x * 32 + threadIdx.x] = row[31 - threadIdx.x];
}

extern "C" __global__ void endless(const volatile int* flag) {
    while (*flag == 0) {
    }
}

extern "C" __global__ void trapping(int n) {
    if (n == 3) __trap();
}
