// The formula of fixed_exp.h for vectors.
#pragma once

#include "fixed_exp.h"
#include "isa.h"
#include "vec_exact.h"

TTS_BEGIN_ISA

struct FixedExp : FixedExpConstants {
    using FixedExpConstants::FixedExpConstants;

    // The weights of x <= 0 as floats, not yet rounded to whole numbers.
    Vec operator()(Vec x) const {
        const Vec s = Vec::all(scale), m = Vec::all(magic);
        x = max(x, Vec::all(lowest));
        const Vec shifted = fused(x, s, m);
        const Vec f = fused(x, s, m - shifted);
        Vec p = Vec::all(c5);
        p = fused(p, f, Vec::all(c4));
        p = fused(p, f, Vec::all(c3));
        p = fused(p, f, Vec::all(c2));
        p = fused(p, f, Vec::all(c1));
        p = fused(p, f, Vec::all(c0));
        return shift_exponent(p, shifted);
    }
};

TTS_END_ISA
