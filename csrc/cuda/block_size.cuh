// Threads of a block.
#pragma once

namespace tts::cuda {

// `threads`, a multiple of 32; fewer in tests under a race detector, which tells only so many threads apart.
constexpr int block_size(int threads) {
#ifdef TTS_CUDA_MOST_THREADS
    return threads < TTS_CUDA_MOST_THREADS ? threads : TTS_CUDA_MOST_THREADS;
#else
    return threads;
#endif
}

}  // namespace tts::cuda
