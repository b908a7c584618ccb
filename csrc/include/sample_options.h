// The sampling options of a row.
#pragma once

#include "args/sample.h"
#include "isa.h"

TTS_BEGIN_ISA

TTS_HD inline SampleOptions options_of(const SampleArgs& args, int64_t row) {
    SampleOptions options = args.same;
    if (args.temperatures) options.temperature = args.temperatures[row];
    if (args.top_ks.data) options.top_k = at(args.top_ks, row);
    if (args.top_ps) options.top_p = args.top_ps[row];
    if (args.min_ps) options.min_p = args.min_ps[row];
    options.seed = args.seeds[row];
    options.offset = args.offsets[row];
    return options;
}

TTS_END_ISA
