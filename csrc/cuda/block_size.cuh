// The number of threads in a block.
#pragma once

namespace tts::cuda {

// `threads`, a multiple of 32. Tests with a race detector use fewer, because it can only distinguish so many.
constexpr int block_size(int threads) {
#ifdef TTS_CUDA_MOST_THREADS
    return threads < TTS_CUDA_MOST_THREADS ? threads : TTS_CUDA_MOST_THREADS;
#else
    return threads;
#endif
}

}  // namespace tts::cuda
