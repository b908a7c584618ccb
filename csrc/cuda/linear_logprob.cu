// linear_logprob: log softmax(hidden W^T / temperature)[target], without storing a row of logits.
//
//   hidden [N, H], W [V, H], targets [N]  ->  out [N];  workspace: max, sum [V / 256, N]
//
// A block multiplies a tile of rows with 256 rows of W, 128 at a time. It folds the logits in its threads'
// registers into a log-sum-exp of each row (Milakov and Gimelshein, arXiv 1805.02867). A second kernel merges
// the chunks in order. Blocks of one chunk are neighbours, so W is read from memory once. A tile has 16 rows
// if there are at most 16, else 64. This does not change the result, because every operation that a compiler
// might fuse in only one of the two has its rounding fixed in the code. Bytes: W once; operations: 2 N H V.
#include "block_size.cuh"
#include "launch.cuh"
#include "linear_logprob.h"
#include "matmul_nt.cuh"

namespace tts::cuda {
namespace {

constexpr int kTilesPerChunk = kLogprobChunk / kTileCols, kWarps = kTileThreads / kWarp,
              kMergeThreads = block_size(128);

// sum = sum of exp(x - max). A row with only -inf gives (-inf, 0); NaN and +inf give NaN.
struct LogSum {
    float max = -INFINITY, sum = 0.0f;

    __device__ static float finite(float top) { return top == -INFINITY ? 0.0f : top; }

    __device__ void merge(float other_max, float other_sum) {
        const float top = fmaxf(max, other_max), shift = finite(top);
        sum = fmaf(sum, expf(max - shift), other_sum * expf(other_max - shift));
        max = top;
    }
};

// Folds columns [0, cols) of one tile's logits into the state of each of the thread's rows. The thread with a
// row's target stores the target's logit.
template <int kRows>
__device__ void fold(ProductTile<kRows>& tile, int cols, float scale,
                     const int (&targets)[2 * ProductTile<kRows>::kDown], float* target_logits,
                     LogSum (&states)[2 * ProductTile<kRows>::kDown]) {
#pragma unroll
    for (int i = 0; i < 2 * ProductTile<kRows>::kDown; ++i) {
        float top = states[i].max, sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& x = tile.c[i / 2][j][i % 2 * 2 + e];
                x = tile.col(j, e) < cols ? __fmul_rn(x, scale) : -INFINITY;
                if (tile.col(j, e) == targets[i]) target_logits[tile.row(i / 2, i % 2)] = x;
                top = fmaxf(top, x);
            }
        }
        const float shift = LogSum::finite(top);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) sum += expf(tile.c[i / 2][j][i % 2 * 2 + e] - shift);
        }
        states[i].sum = fmaf(states[i].sum, expf(states[i].max - shift), sum);
        states[i].max = top;
    }
}

// Merges the states of each row, first of four neighbouring threads, then of four warps; `shared` [kRows *
// kWarps] is free.
template <int kRows>
__device__ void finish(LogSum (&states)[2 * ProductTile<kRows>::kDown], int rows, float2* shared, float* max,
                       float* sum) {
#pragma unroll
    for (int i = 0; i < 2 * ProductTile<kRows>::kDown; ++i) {
        LogSum& s = states[i];
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            s.merge(__shfl_xor_sync(kAllLanes, s.max, step), __shfl_xor_sync(kAllLanes, s.sum, step));
        }
        if (lane() % 4 == 0) shared[ProductTile<kRows>::row(i / 2, i % 2) * kWarps + warp()] = {s.max, s.sum};
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= rows) return;
    LogSum all;
    for (int w = 0; w < kWarps; ++w) {
        const float2 part = shared[threadIdx.x * kWarps + w];
        all.merge(part.x, part.y);
    }
    max[threadIdx.x] = all.max;
    sum[threadIdx.x] = all.sum;
}

// c = rows [first_row ..) of hidden times rows [first_col ..) of the weight.
template <class T, int kRows>
__device__ void multiply(TensorTile<T, kRows>& tile, const LinearLogprobArgs& args, int64_t first_row,
                         int64_t first_col, void* shared) {
    const T* hidden = static_cast<const T*>(args.hidden.data);
    const T* weight = static_cast<const T*>(args.weight.data);
    tile.multiply(
        [&](int r) {
            return first_row + r < args.rows ? hidden + (first_row + r) * args.hidden_stride : nullptr;
        },
        [&](int r) {
            return first_col + r < args.vocabulary ? weight + (first_col + r) * args.weight_stride : nullptr;
        },
        args.width, shared);
}

template <int kRows>
__device__ void multiply(ScalarTile<kRows>& tile, const LinearLogprobArgs& args, int64_t first_row,
                         int64_t first_col, void* shared) {
    tile.multiply(
        [&](int r, int64_t k) {
            return first_row + r < args.rows ? load(args.hidden, (first_row + r) * args.hidden_stride + k)
                                             : 0.0f;
        },
        [&](int r, int64_t k) {
            return first_col + r < args.vocabulary
                       ? load(args.weight, (first_col + r) * args.weight_stride + k)
                       : 0.0f;
        },
        args.width, shared);
}

template <class Product, int kRows>
__global__ __launch_bounds__(kTileThreads, 2) void logprob_kernel(LinearLogprobArgs args,
                                                                  int64_t row_blocks) {
    extern __shared__ __align__(16) uint8_t shared[];
    const int64_t chunk = blockIdx.x / row_blocks, first_row = blockIdx.x % row_blocks * kRows;
    const int64_t begin = chunk * kLogprobChunk;
    const int rows = static_cast<int>(min(int64_t{kRows}, args.rows - first_row));
    LogSum states[2 * ProductTile<kRows>::kDown];
    for (int t = 0; t < kTilesPerChunk; ++t) {
        const int64_t first = begin + t * kTileCols;
        if (first >= args.vocabulary) break;
        int targets[2 * ProductTile<kRows>::kDown];  // in this tile, or -1
#pragma unroll
        for (int i = 0; i < 2 * ProductTile<kRows>::kDown; ++i) {
            const int row = ProductTile<kRows>::row(i / 2, i % 2);
            const int64_t target = row < rows ? at(args.targets, first_row + row) - first : -1;
            targets[i] = target >= 0 && target < kTileCols ? static_cast<int>(target) : -1;
        }
        Product tile;
        tile.clear();
        multiply(tile, args, first_row, first, shared);
        const int cols = static_cast<int>(min(int64_t{kTileCols}, args.vocabulary - first));
        fold<kRows>(tile, cols, args.inv_temperature, targets, args.target + first_row, states);
    }
    const int64_t out = chunk * args.rows + first_row;
    finish<kRows>(states, rows, reinterpret_cast<float2*>(shared), args.max + out, args.sum + out);
}

// log(exp(target - max) / sum) over all chunks, with a warp for each row: first the chunks of a lane in
// order, then lanes in pairs.
__global__ __launch_bounds__(kMergeThreads) void merge_kernel(LinearLogprobArgs args, int64_t chunks) {
    const int64_t row = int64_t{blockIdx.x} * (kMergeThreads / kWarp) + warp();
    if (row >= args.rows) return;
    LogSum state;
    for (int64_t c = lane(); c < chunks; c += kWarp) {
        state.merge(args.max[c * args.rows + row], args.sum[c * args.rows + row]);
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
        state.merge(__shfl_xor_sync(kAllLanes, state.max, step), __shfl_xor_sync(kAllLanes, state.sum, step));
    }
    if (lane() == 0) args.target[row] = args.target[row] - state.max - logf(state.sum);
}

template <class Product, int kRows>
void run(const LinearLogprobArgs& args, cudaStream_t stream) {
    const int64_t chunks = divide_up(args.vocabulary, kLogprobChunk),
                  row_blocks = divide_up(args.rows, kRows);
    launch(logprob_kernel<Product, kRows>, chunks * row_blocks, kTileThreads, Product::kSharedBytes, stream,
           args, row_blocks);
    launch(merge_kernel, divide_up(args.rows, kMergeThreads / kWarp), kMergeThreads, 0, stream, args, chunks);
}

}  // namespace

void linear_logprob(const LinearLogprobArgs& args, cudaStream_t stream) {
    const bool few = args.rows <= 16;
    const bool tensor = args.hidden.dtype == args.weight.dtype && args.hidden.dtype != DType::f32 &&
                        aligned(args.hidden.data, args.hidden_stride * 2) &&
                        aligned(args.weight.data, args.weight_stride * 2);
    if (!tensor) return few ? run<ScalarTile<16>, 16>(args, stream) : run<ScalarTile<64>, 64>(args, stream);
    if (args.hidden.dtype == DType::bf16)
        return few ? run<TensorTile<bf16, 16>, 16>(args, stream)
                   : run<TensorTile<bf16, 64>, 64>(args, stream);
    return few ? run<TensorTile<f16, 16>, 16>(args, stream) : run<TensorTile<f16, 64>, 64>(args, stream);
}

}  // namespace tts::cuda
