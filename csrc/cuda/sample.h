#pragma once

#include "args/sample.h"
#include "stream.h"

namespace tts::cuda {

// Thread blocks of a row at most.
inline constexpr int kMostSampleBlocks = 8;

struct SampleGrid {
    int64_t blocks;  // of a row
    int64_t words;   // of workspace, of 8 bytes
};

SampleGrid sample_grid(const SampleArgs& args);

// One launch; with several blocks a row they wait for each other, which takes a device that launches
// cooperatively, and every row's counters are cleared before.
void sample(const SampleArgs& args, const SampleGrid& grid, void* workspace, cudaStream_t stream);

}  // namespace tts::cuda
