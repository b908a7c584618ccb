// C = A B^T with cp.async in two stages, ldmatrix and mma.sync: A [16, k], B [8, k], C [16, 8], one warp, k a
// multiple of 16.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <class T>
__device__ void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
__device__ void multiply_add<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ void multiply_add<__half>(float (&d)[4], const unsigned (&a)[4],
                                     const unsigned (&b)[2]) {  // twice k8
    for (int i = 0; i < 2; ++i)
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
}

__device__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
__device__ void copy_row(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global)
                 : "memory");
}

template <class T>
__device__ void product(const T* a, const T* b, float* c, int k) {
    __shared__ T rows[2][24][24];  // 16 of A and 8 of B, padded to 48 bytes
    const int t = threadIdx.x;
    auto fetch = [&](int stage, int column) {
        for (int i = t; i < 48; i += 32) {
            const int row = i / 2, half = i % 2 * 8;
            const T* from = row < 16 ? a + row * k : b + (row - 16) * k;
            copy_row(&rows[stage][row][half], from + column + half);
        }
        asm volatile("cp.async.commit_group;");
    };
    float d[4] = {};
    fetch(0, 0);
    for (int column = 0, stage = 0; column < k; column += 16, stage ^= 1) {
        if (column + 16 < k) {
            fetch(stage ^ 1, column + 16);
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
        __syncwarp();
        unsigned x[4], y[2];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(shared_address(&rows[stage][t % 16][t / 16 * 8])));
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(y[0]), "=r"(y[1])
                     : "r"(shared_address(&rows[stage][16 + t % 8][t / 8 % 2 * 8])));
        multiply_add<T>(d, x, y);
        __syncwarp();
    }
    for (int i = 0; i < 4; ++i) c[(t / 4 + 8 * (i / 2)) * 8 + 2 * (t % 4) + i % 2] = d[i];
}

extern "C" __global__ void product_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int k) {
    product(a, b, c, k);
}
extern "C" __global__ void product_f16(const __half* a, const __half* b, float* c, int k) {
    product(a, b, c, k);
}

// ldmatrix.trans, then movmatrix back, then stmatrix-free stores: y = x transposed, [8, 8]
extern "C" __global__ void transpose(const unsigned short* x, unsigned short* y, unsigned short* same) {
    __shared__ __align__(16) unsigned short tile[8][8];
    const int t = threadIdx.x;
    for (int i = t; i < 64; i += 32) tile[i / 8][i % 8] = x[i];
    __syncwarp();
    unsigned word, back;
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(word)
                 : "r"(shared_address(&tile[t % 8][0])));
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(back) : "r"(word));
    reinterpret_cast<unsigned*>(y)[t] = word;
    reinterpret_cast<unsigned*>(same)[t] = back;
}
