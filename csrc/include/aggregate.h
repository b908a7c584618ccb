// The aggregate of a reasoning chain's step scores, as a state that is updated with one score at a time.
//
// The state can start from an earlier aggregate over `count` steps, so that a chain can be continued without
// its old scores. Products are computed in float64, which keeps all digits of forty factors of 0.9. NaN
// propagates.
#pragma once

#include <cstdint>

#include "isa.h"

namespace tts {

enum class Aggregate : int32_t { last, min, prod, mean, max, sum };

}  // namespace tts

TTS_BEGIN_ISA

class AggregateState {
  public:
    // `prior` is the aggregate of `count` earlier steps. If count is 0, there are none.
    TTS_HD AggregateState(Aggregate how, float prior, int64_t count)
        : how_(how), count_(count), value_(count > 0 ? prior : 0.0) {
        if (how_ == Aggregate::mean) value_ *= static_cast<double>(count_);
    }

    TTS_HD void add(float score) {
        const double x = score;
        const bool first = count_++ == 0;
        if (first || how_ == Aggregate::last) {
            value_ = x;
        } else if (how_ == Aggregate::prod) {
            value_ *= x;
        } else if (how_ == Aggregate::mean || how_ == Aggregate::sum) {
            value_ += x;
        } else {  // min and max without a branch on scores; NaN stays NaN
            const double least = x < value_ ? x : value_, most = x > value_ ? x : value_;
            value_ = x != x ? x : how_ == Aggregate::min ? least : most;
        }
    }

    // A chain without any step has the score -inf, so that it is never kept before a chain with a score.
    TTS_HD float value() const {
        if (count_ == 0) return -__builtin_inff();
        return static_cast<float>(how_ == Aggregate::mean ? value_ / static_cast<double>(count_) : value_);
    }

  private:
    Aggregate how_;
    int64_t count_;
    double value_;
};

TTS_END_ISA
