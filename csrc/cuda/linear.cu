// linear: out = x W^T + bias + residual. The bits of a row do not depend on the other rows.
//
//   x [T, K], W [N, K] or whole numbers in panels (int_tile.h), bias [N], residual [T, N]  ->  out [T, N]
//
// The depth is cut into chunks (linear_chunk). Each chunk is summed in order by matmul_nt.cuh, whose sums do
// not depend on other rows; chunks are added in ascending order, starting from 0. A block takes all chunks of
// its tile. With few rows it takes only one chunk, so that more blocks read the weight, and a second launch
// adds up the sums. Both give the same result. Bytes: W once for each 64 rows, from L2 except for the first
// time; operations: 2 T N K.
#include "block_size.cuh"
#include "launch.cuh"
#include "linear.h"
#include "quantized_tile.cuh"

namespace tts::cuda {
namespace {

constexpr int kAddThreads = block_size(256);

__device__ void put(void* out, DType dtype, int64_t i, float x) {
    if (dtype == DType::f32) static_cast<float*>(out)[i] = x;
    if (dtype == DType::bf16) static_cast<bf16*>(out)[i] = from_float<bf16>(x);
    if (dtype == DType::f16) static_cast<f16*>(out)[i] = from_float<f16>(x);
}

// Adds bias and residual to a sum over the depth, and stores the result.
template <class Args>
__device__ void finish(const Args& args, int64_t row, int64_t column, float sum) {
    if (args.bias.data) sum = __fadd_rn(sum, load(args.bias, column));
    if (args.residual) {
        const FloatArray residual{args.residual, args.x.dtype};
        sum = __fadd_rn(sum, load(residual, row * args.residual_stride + column));
    }
    put(args.out, args.x.dtype, row * args.columns + column, sum);
}

// The place of a tile: its first row, column and element of the depth, and the end of the depth.
struct Corner {
    int64_t row, column, k, width;
};

// Pointers to rows of x, from the corner's depth on; null for rows that do not exist.
template <class T, class Args>
__device__ auto rows_of_x(const Args& args, Corner at) {
    const T* x = static_cast<const T*>(args.x.data) + at.k;
    return
        [&args, x, at](int r) { return at.row + r < args.rows ? x + (at.row + r) * args.x_stride : nullptr; };
}

template <class T, int kRows>
__device__ void multiply(TensorTile<T, kRows>& tile, const LinearArgs& args, Corner at, void* shared) {
    const T* weight = static_cast<const T*>(args.weight) + at.k;
    tile.multiply(
        rows_of_x<T>(args, at),
        [&](int c) { return at.column + c < args.columns ? weight + (at.column + c) * args.depth : nullptr; },
        at.width, shared);
}

template <class T, int kRows, int kBits>
__device__ void multiply(QuantizedTile<T, kRows, kBits>& tile, const LinearQuantizedArgs& args, Corner at,
                         void* shared) {
    tile.multiply(rows_of_x<T>(args, at), args.weight, at.column, args.columns, at.k, at.width, shared);
}

__device__ float weight_at(const LinearArgs& args, int64_t column, int64_t k) {
    return load({args.weight, args.x.dtype}, column * args.depth + k);
}

// Rounded to x's type, as for tensor cores.
__device__ float weight_at(const LinearQuantizedArgs& args, int64_t column, int64_t k) {
    const float w = dequantized(args.weight, column, k);
    if (args.x.dtype == DType::bf16) return to_float(from_float<bf16>(w));
    return args.x.dtype == DType::f16 ? to_float(from_float<f16>(w)) : w;
}

template <int kRows, class Args>
__device__ void multiply(ScalarTile<kRows>& tile, const Args& args, Corner at, void* shared) {
    tile.multiply(
        [&](int r, int64_t k) {
            return at.row + r < args.rows ? load(args.x, (at.row + r) * args.x_stride + at.k + k) : 0.0f;
        },
        [&](int c, int64_t k) {
            return at.column + c < args.columns ? weight_at(args, at.column + c, at.k + k) : 0.0f;
        },
        at.width, shared);
}

template <class Product, int kRows, class Args>
__global__ __launch_bounds__(kTileThreads, 2) void linear_kernel(const __grid_constant__ Args args,
                                                                 float* parts, int64_t splits) {
    extern __shared__ __align__(16) uint8_t shared[];
    const int64_t chunk = linear_chunk(args.x.dtype);
    const int64_t row_blocks = divide_up(args.rows, kRows), split = blockIdx.x / row_blocks % splits;
    Corner at{.row = blockIdx.x % row_blocks * kRows,
              .column = blockIdx.x / row_blocks / splits * kTileCols,
              .k = splits > 1 ? split * chunk : 0,
              .width = 0};
    const int64_t end = splits > 1 ? min(at.k + chunk, args.depth) : args.depth;
    ProductTile<kRows> total;
    total.clear();
    for (; at.k < end; at.k += chunk) {
        at.width = min(chunk, end - at.k);
        Product tile;
        tile.clear();
        multiply(tile, args, at, shared);
        total.add(tile);
    }
    total.each([&](int r, int c, float sum) {
        const int64_t row = at.row + r, column = at.column + c;
        if (row >= args.rows || column >= args.columns) return;
        if (splits > 1) {
            parts[(split * args.rows + row) * args.columns + column] = sum;
        } else {
            finish(args, row, column, sum);
        }
    });
}

// Adds up the chunks, one element for each thread.
template <class Args>
__global__ __launch_bounds__(kAddThreads) void add_kernel(const __grid_constant__ Args args,
                                                          const float* parts, int64_t splits) {
    const int64_t size = args.rows * args.columns, i = int64_t{blockIdx.x} * kAddThreads + threadIdx.x;
    if (i >= size) return;
    float sum = 0.0f;
    for (int64_t s = 0; s < splits; ++s) sum = __fadd_rn(sum, parts[s * size + i]);
    finish(args, i / args.columns, i % args.columns, sum);
}

template <class Product, int kRows, class Args>
void run(const Args& args, float* parts, cudaStream_t stream) {
    const int64_t splits = linear_splits(args.rows, args.depth, args.x.dtype);
    const int64_t blocks = divide_up(args.rows, kRows) * divide_up(args.columns, kTileCols) * splits;
    launch(linear_kernel<Product, kRows, Args>, blocks, kTileThreads, Product::kSharedBytes, stream, args,
           parts, splits);
    if (splits == 1) return;
    launch(add_kernel<Args>, divide_up(args.rows * args.columns, kAddThreads), kAddThreads, 0, stream, args,
           parts, splits);
}

// Calls f with the number of rows in a tile. This number does not change the result.
template <int kMany, class F>
void by_rows(int64_t rows, F f) {
    rows <= 16 ? f.template operator()<16>() : f.template operator()<kMany>();
}

template <class Args>
bool in_units_of_16(const Args& args) {
    return args.x.dtype != DType::f32 && aligned(args.x.data, args.x_stride * 2);
}

}  // namespace

void linear(const LinearArgs& args, float* parts, cudaStream_t stream) {
    const bool tensor = in_units_of_16(args) && aligned(args.weight, args.depth * 2);
    by_rows<64>(args.rows, [&]<int kRows>() {
        if (!tensor) return run<ScalarTile<kRows>, kRows>(args, parts, stream);
        if (args.x.dtype == DType::bf16) return run<TensorTile<bf16, kRows>, kRows>(args, parts, stream);
        return run<TensorTile<f16, kRows>, kRows>(args, parts, stream);
    });
}

void linear(const LinearQuantizedArgs& args, float* parts, cudaStream_t stream) {
    // 32 rows: the 8-bit slice that is being loaded needs the registers that 64 rows would take.
    by_rows<32>(args.rows, [&]<int kRows>() {
        if (!in_units_of_16(args)) return run<ScalarTile<kRows>, kRows>(args, parts, stream);
        if (args.weight.bits == 8 && args.x.dtype == DType::bf16)
            return run<QuantizedTile<bf16, kRows, 8>, kRows>(args, parts, stream);
        if (args.weight.bits == 8) return run<QuantizedTile<f16, kRows, 8>, kRows>(args, parts, stream);
        if (args.x.dtype == DType::bf16)
            return run<QuantizedTile<bf16, kRows, 4>, kRows>(args, parts, stream);
        return run<QuantizedTile<f16, kRows, 4>, kRows>(args, parts, stream);
    });
}

}  // namespace tts::cuda
