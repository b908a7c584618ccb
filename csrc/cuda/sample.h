#pragma once

#include "args/sample.h"
#include "stream.h"

namespace tts::cuda {

// The largest number of thread blocks for a row.
inline constexpr int kMostSampleBlocks = 8;

struct SampleGrid {
    int64_t blocks;  // of a row
    int64_t words;   // of workspace, of 8 bytes
};

SampleGrid sample_grid(const SampleArgs& args);

// One launch. If a row has several blocks, they wait for each other: the device must support cooperative
// launches, and every row's counters are cleared before.
void sample(const SampleArgs& args, const SampleGrid& grid, void* workspace, cudaStream_t stream);

}  // namespace tts::cuda
