#pragma once

#include <cstdint>

#include "args/sample.h"
#include "isa.h"

namespace tts {

// A row is processed in blocks of logits, and cut between threads at multiples of a chunk of blocks.
inline constexpr int64_t kSampleBlock = 1024, kSampleChunk = 16;  // logits in a block, blocks in a chunk

struct SampleRow {
    FloatArray logits;  // [V]
    int64_t vocab;      // V
    SampleOptions options;
};

// The sums of one block of logits.
struct SampleBlock {
    uint64_t all;         // weights at the row's temperature
    uint64_t untempered;  // weights at temperature 1, relative to `max`; at any other temperature only
    uint64_t above;       // of `all`: those above the bracket
    uint64_t kept;        // of `all`: those that may be drawn
    int32_t above_count, listed;  // logits above the bracket and inside it
    int32_t ties;                 // kept logits that equal the cut
    float max;                    // NaN if any logit is
};

// The working memory for a row. "Entries" is V, rounded up to a multiple of the block.
struct SampleWorkspace {
    SampleBlock* blocks;  // [entries / block]
    float* list;        // [entries]: the logits inside the bracket, block by block, each block's filled up to
                        // whole vectors with -inf; a chunk's begin where its logits would
    float* picked;      // [entries]: the list without gaps
    uint64_t* weights;  // [entries + 16]: theirs
    float max;          // of the row
    float low, high;    // the bracket: logits in [low, high] are listed
    float floor;        // logits below it are never drawn
    uint64_t untempered;  // the sum of all exp(logit - max), as weights
    bool widened;         // the first bracket missed
};

struct SampleDraw {
    int64_t token;  // -1: there is none
    float logit, max;
    uint64_t untempered;  // the sum of all exp(logit - max), as weights
};

}  // namespace tts

TTS_BEGIN_ISA

// The steps for one row, in this order. Steps 1 and 3 process blocks [begin, end), cut at multiples of a
// chunk. The pieces may run in any order and on any thread.
void sample_scan(const SampleRow& row, SampleWorkspace& space, int64_t begin, int64_t end);
// False if the draw is already known.
bool sample_plan(const SampleRow& row, SampleWorkspace& space, SampleDraw& draw);
void sample_weigh(const SampleRow& row, SampleWorkspace& space, int64_t begin, int64_t end);
// False if the bracket did not contain the cut: it was widened, and sample_weigh must run again.
bool sample_draw(const SampleRow& row, SampleWorkspace& space, SampleDraw& draw);
// To be called after sample_scan: the k <= vocab largest logits and their ids, best first, the lower id first
// on ties.
void sample_likeliest(const SampleRow& row, const SampleWorkspace& space, int64_t k, int64_t* ids,
                      float* logits);

TTS_END_ISA
