// step_scores: the score of a process reward model at the last token of each step.
//
//   out[s] = act(w . norm(hidden[positions[s]]) + b)
//
// One block of 128 threads for each step. A row of 4096 bfloat16 is four 16-byte loads for each thread, all
// in flight at the same time. Bytes: S rows of H elements from memory; the head's row in float32 is read from
// L2 after the first step.
//
// With a hidden layer, z = w . relu(W1 norm(x) + b1) + b: a block multiplies a tile of gathered rows with 128
// rows of W1 (matmul_nt.cuh), and folds its hidden units into one number for each step, so [S, H1] is never
// stored. If there is a norm, rows are multiplied in float32. Bytes: W1 once; operations: 2 S H H1.
#include "block_size.cuh"
#include "launch.cuh"
#include "matmul_nt.cuh"
#include "score.cuh"
#include "step_scores.h"

namespace tts::cuda {
namespace {

constexpr int kThreads = block_size(128), kWarps = kTileThreads / kWarp;
static_assert(kHiddenUnits == kTileCols);

template <class Head>
__global__ __launch_bounds__(kThreads) void step_kernel(StepScoresArgs args, bool vectors) {
    const float score = Head::template score<kThreads>(args, blockIdx.x, vectors);
    if (threadIdx.x == 0) args.out[blockIdx.x] = score;
}

// ---- the hidden layer -------------------------------------------------------------------------------------

// 1 / rms of a tile's rows, with a warp for each row; 1 without a norm.
template <int kRows>
__device__ void row_scales(const StepScoresArgs& args, int64_t first_step, int rows, float* scales) {
    for (int r = warp(); r < kRows; r += kWarps) {
        float squares = 0.0f;
        if (args.head.norm_weight.data && r < rows) {
            const int64_t row = at(args.positions, first_step + r) * args.stride;
            for (int64_t i = lane(); i < args.width; i += kWarp) {
                const float x = load(args.hidden, row + i);
                squares = fmaf(x, x, squares);
            }
        }
        squares = reduce_lanes(squares, Add{});
        if (lane() == 0) {
            scales[r] = args.head.norm_weight.data ? inverse_rms(squares, args.width, args.head.eps) : 1.0f;
        }
    }
}

template <class T, int kRows>
__device__ void multiply(TensorTile<T, kRows>& tile, const StepScoresArgs& args, int64_t first_step, int rows,
                         int64_t first_unit, void* shared) {
    const T* hidden = static_cast<const T*>(args.hidden.data);
    const T* w1 = static_cast<const T*>(args.head.w1.data);
    tile.multiply(
        [&](int r) { return r < rows ? hidden + at(args.positions, first_step + r) * args.stride : nullptr; },
        [&](int r) {
            return first_unit + r < args.head.hidden_width ? w1 + (first_unit + r) * args.width : nullptr;
        },
        args.width, shared);
}

template <int kRows>
__device__ void multiply(ScalarTile<kRows>& tile, const StepScoresArgs& args, int64_t first_step, int rows,
                         int64_t first_unit, void* shared) {
    const FloatArray norm = args.head.norm_weight;
    tile.multiply(
        [&](int r, int64_t k) {
            if (r >= rows) return 0.0f;
            const float x = load(args.hidden, at(args.positions, first_step + r) * args.stride + k);
            return norm.data ? x * load(norm, k) : x;
        },
        [&](int r, int64_t k) {
            return first_unit + r < args.head.hidden_width
                       ? load(args.head.w1, (first_unit + r) * args.width + k)
                       : 0.0f;
        },
        args.width, shared);
}

// partials[block][s] = sum over the block's units j of w[j] relu(z[s][j] + b1[j]). NaN stays NaN.
template <class Product, int kRows>
__global__ __launch_bounds__(kTileThreads, 2) void hidden_kernel(StepScoresArgs args, int64_t row_blocks) {
    extern __shared__ __align__(16) uint8_t shared[];
    __shared__ float scales[kRows], parts[kRows][kWarps];
    const int64_t block = blockIdx.x / row_blocks, first_unit = block * kHiddenUnits;
    const int64_t first_step = blockIdx.x % row_blocks * kRows;
    const int rows = static_cast<int>(min(int64_t{kRows}, args.steps - first_step));
    row_scales<kRows>(args, first_step, rows, scales);
    Product tile;
    tile.clear();
    multiply(tile, args, first_step, rows, first_unit, shared);

    float w[8], b1[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int64_t unit = first_unit + tile.col(i / 2, i % 2);
        const bool there = unit < args.head.hidden_width;
        w[i] = there ? args.head.weight[unit] : 0.0f;
        b1[i] = there && args.head.b1.data ? load(args.head.b1, unit) : 0.0f;
    }
    __syncthreads();  // scales are written, for any width
#pragma unroll
    for (int i = 0; i < 2 * Product::kDown; ++i) {
        const int row = tile.row(i / 2, i % 2);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float z = fmaf(tile.c[i / 2][j / 2][i % 2 * 2 + j % 2], scales[row], b1[j]);
            sum = fmaf(z < 0.0f ? 0.0f : z, w[j], sum);
        }
        sum = reduce_lanes<4>(sum, Add{});
        if (lane() % 4 == 0) parts[row][warp()] = sum;
    }
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x);
    if (row >= rows) return;
    float sum = 0.0f;
    for (int part = 0; part < kWarps; ++part) sum += parts[row][part];
    args.partials[block * args.steps + first_step + row] = sum;
}

template <class Product, int kRows>
void run(const StepScoresArgs& args, cudaStream_t stream) {
    const int64_t row_blocks = divide_up(args.steps, kRows);
    launch(hidden_kernel<Product, kRows>, divide_up(args.head.hidden_width, kHiddenUnits) * row_blocks,
           kTileThreads, Product::kSharedBytes, stream, args, row_blocks);
}

}  // namespace

void step_scores_hidden(const StepScoresArgs& args, cudaStream_t stream) {
    const bool few = args.steps <= 16;
    const DType type = args.hidden.dtype;
    const bool tensor = type == args.head.w1.dtype && type != DType::f32 && !args.head.norm_weight.data &&
                        aligned(args.hidden.data, args.stride * 2) &&
                        aligned(args.head.w1.data, args.width * 2);
    if (!tensor) return few ? run<ScalarTile<16>, 16>(args, stream) : run<ScalarTile<64>, 64>(args, stream);
    if (type == DType::bf16)
        return few ? run<TensorTile<bf16, 16>, 16>(args, stream)
                   : run<TensorTile<bf16, 64>, 64>(args, stream);
    return few ? run<TensorTile<f16, 16>, 16>(args, stream) : run<TensorTile<f16, 64>, 64>(args, stream);
}

void step_scores(const StepScoresArgs& args, cudaStream_t stream) {
    if (args.head.w1.data) step_scores_hidden(args, stream);
    dispatch_head(args, [&](auto head) {
        launch(step_kernel<decltype(head)>, args.steps, kThreads, 0, stream, args, reads_vectors(args));
    });
}

}  // namespace tts::cuda
