// A rough picture of a row of logits from a sample of a few thousand: where its k-th largest is, and where
// the tail that top-p cuts off ends. Both are brackets of four standard deviations to either side.
#pragma once

#include <cstdint>

#include "isa.h"
#include "vec.h"
#include "vec_fixed_exp.h"

namespace tts {

struct Bracket {
    float low = -__builtin_inff(), high = __builtin_inff();
};

}  // namespace tts

TTS_BEGIN_ISA

// A histogram of 4096 logits, spread evenly over the row, over log2 of their weights. Bin 0 begins at the
// largest logit, the last bin has those of weight 0. No exact result depends on it.
class Sketch {
  public:
    static constexpr int kGroups = 256, kGroup = 16, kPerOctave = 32, kBins = 42 * kPerOctave + 1;

    // x [vocab], vocab >= kGroup; `top` is its maximum.
    template <class T>
    Sketch(const T* x, int64_t vocab, float top, FixedExp exp)
        : top_(top),
          step_(1.0f / (kPerOctave * exp.scale)),
          ratio_(static_cast<float>(vocab) / (kGroups * kGroup)) {
        for (int64_t g = 0; g < kGroups; ++g) add(x + g * (vocab - kGroup) / (kGroups - 1), exp);
        float bins[Vec::width];
        for (int b = 0; b < kBins; b += Vec::width) {
            for (int i = 0; i < Vec::width; ++i) bins[i] = static_cast<float>(b + i) + 0.5f;
            TTS_ISA::exp(Vec::load(bins) * Vec::all(-0.693147181f / kPerOctave)).store(weights_ + b);
        }
    }

    // The k-th largest logit.
    Bracket kth(int64_t k) const {
        const float expected = static_cast<float>(k) / ratio_,
                    margin = 4.0f * __builtin_sqrtf(expected) + 8.0f;
        Bracket found;
        float count = 0.0f;
        for (int b = 0; b < kBins - 1; ++b) {
            count += static_cast<float>(counts_[b]);
            if (count < expected - margin) found.high = edge(b + 1);
            if (count < expected + margin) continue;
            found.low = edge(b + 1);
            break;
        }
        return found;
    }

    // The end of the tail: the smallest logits that together have the weight `fraction` of the row. The row's
    // sum is only estimated. The few largest logits may have most of the weight and be missing in the sample;
    // then there is no upper bound.
    Bracket tail_of_guess(float fraction) const {
        Sum all;
        float count = 0.0f, heavy = 0.0f;
        for (int b = 0; b < kBins; ++b) {
            all.add(counts_[b], weights_[b]);
            count += static_cast<float>(counts_[b]);
            if (count <= 8.0f) heavy = all.sum;
        }
        const float error = 4.0f * __builtin_sqrtf(all.squares), light = all.sum - heavy - error;
        const float least = light * ratio_ > 1.0f ? light : 1.0f / ratio_;
        const bool bounded = heavy + 1.0f < 0.1f * all.sum;
        return tail(fraction * least, bounded ? fraction * (all.sum + error) : kInfinity);
    }

    // The end of the tail with the weight `sum`, in units of the largest logit's weight.
    Bracket tail_of(double sum) const {
        const float here = static_cast<float>(sum) / ratio_;
        return tail(here, here);
    }

  private:
    struct Sum {
        float sum = 0.0f, squares = 0.0f;
        void add(uint32_t count, float weight) {
            sum += static_cast<float>(count) * weight;
            squares += static_cast<float>(count) * weight * weight;
        }
    };

    static bool surely_less(float a, float b, float squares) {
        return a < b && (b - a) * (b - a) > 16.0f * squares;
    }

    // Starts at the smallest logit, so that heavy ones do not disturb the sum. The tail has a weight from
    // `least` to `most` here.
    Bracket tail(float least, float most) const {
        Bracket found;
        Sum below;
        for (int b = kBins - 1; b > 0; --b) {
            below.add(counts_[b], weights_[b]);
            const float spread = 4.0f * weights_[b];
            if (surely_less(below.sum + spread, least, below.squares)) found.low = edge(b);
            if (!surely_less(most, below.sum - spread, below.squares)) continue;
            found.high = edge(b);
            break;
        }
        return found;
    }

    float edge(int bin) const {
        return top_ - static_cast<float>(bin) * step_;
    }  // the largest logit of the bin

    template <class T>
    void add(const T* x, FixedExp exp) {
        float bins[kGroup];
        for (int i = 0; i < kGroup; i += Vec::width) {
            const Vec d = max(Vec::load(x + i) - Vec::all(top_), Vec::all(exp.lowest));
            (d * Vec::all(-kPerOctave * exp.scale)).store(bins + i);
        }
        for (float bin : bins) {
            const int b = static_cast<int>(bin);
            ++counts_[b < kBins ? b : kBins - 1];
        }
    }

    float top_, step_, ratio_;
    uint32_t counts_[kBins] = {};
    float weights_[kBins + Vec::width];
};

TTS_END_ISA
