// Whole-number arithmetic for cutting work into pieces. Arguments must not be negative.
#pragma once

#include <cstdint>

#include "isa.h"

TTS_BEGIN_ISA

TTS_HD constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
TTS_HD constexpr int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

TTS_END_ISA
