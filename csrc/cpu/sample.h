#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace tts {

// A row is worked on in blocks of so many logits, and cut between threads at multiples of a chunk.
inline constexpr int64_t kSampleBlock = 1024, kSampleChunk = 16 * kSampleBlock;

struct SampleOptions {
    float temperature;  // >= 0; 0: the largest logit
    int64_t top_k;      // >= 0; 0: off
    float top_p;        // in (0, 1]; 1: off
    float min_p;        // in [0, 1]
    int64_t seed, offset;
};

struct SampleRow {
    FloatArray logits;  // [V]
    int64_t vocab;      // V
    SampleOptions options;
};

// What one block adds up to, in units of weight.
struct SampleBlock {
    uint64_t all;  // at the row's temperature
    uint64_t untempered;
    uint64_t above;  // of `all`: logits above the bracket
    int32_t above_count, listed;
    float max;  // NaN if any logit is
};

// What one row needs while it is worked on.
struct SampleWorkspace {
    SampleBlock* blocks;        // [ceil(V / block)]
    float* list;                // [V rounded up to chunks + 64]: the logits inside the bracket
    uint64_t* weights;          // [as list]: theirs
    float* scratch_list;        // [as list]
    uint64_t* scratch_weights;  // [as list]
    float max;                  // of the row
    float low, high;            // the bracket: logits in [low, high] are listed
    float floor;                // logits below it are not drawn
    bool tempered, cut;         // the temperature is neither 0 nor 1; some option removes tokens
};

struct SampleDraw {
    int64_t token;  // -1: there is none
    float logit, max;
    uint64_t untempered;  // sum of the weights exp(logit - max)
};

}  // namespace tts

TTS_BEGIN_ISA

// The steps for one row, in this order; steps 1 and 3 take blocks [begin, end), which different threads may
// share.
void sample_scan(const SampleRow& row, SampleWorkspace& space, int64_t begin, int64_t end);
// False if the draw is known already.
bool sample_plan(const SampleRow& row, SampleWorkspace& space, SampleDraw& draw);
void sample_weigh(const SampleRow& row, SampleWorkspace& space, int64_t begin, int64_t end);
// False if the bracket missed: it was widened, and sample_weigh must run again.
bool sample_draw(const SampleRow& row, SampleWorkspace& space, SampleDraw& draw);

TTS_END_ISA
