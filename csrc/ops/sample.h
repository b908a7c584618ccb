// sample, checked and ready to run: the inputs for the kernels, and the results.
#pragma once

#include <limits>

#include "common.h"
#include "sample_options.h"

namespace tts::ops {

struct Sampling {
    Tensor logits, seeds, offsets;
    Tensor tokens, logprobs, top_ids, top_logprobs;
    SampleArgs args;

    Sampling(const Tensor& logits_in, const Tensor& seeds_in, const Tensor& offsets_in, double temperature,
             int64_t top_k, double top_p, double min_p, const std::optional<Tensor>& temperatures,
             const std::optional<Tensor>& top_ks, const std::optional<Tensor>& top_ps,
             const std::optional<Tensor>& min_ps, int64_t top)
        : logits(dense_rows(logits_in)), seeds(dense(seeds_in)), offsets(dense(offsets_in)) {
        const int64_t rows = logits.size(0), vocab = logits.size(1);
        const auto one_a_row = [&](const Tensor& t) {
            return is_here(t) && t.dim() == 1 && t.size(0) == rows;
        };
        const auto absent_or_one_a_row = [&](const std::optional<Tensor>& t) { return !t || one_a_row(*t); };
        require(vocab >= 1 && vocab <= int64_t{1} << 24, "logits");
        require(one_a_row(seeds) && seeds.scalar_type() == ScalarType::Long, "seeds");
        require(one_a_row(offsets) && offsets.scalar_type() == ScalarType::Long, "offsets");
        require(absent_or_one_a_row(temperatures) && absent_or_one_a_row(top_ks) &&
                    absent_or_one_a_row(top_ps) && absent_or_one_a_row(min_ps),
                "options");
        require_valid(temperature, top_k, top_p, min_p);
        require(top >= 0 && top <= kMostTop && top <= vocab, "top_logprobs");
        const float smallest = std::numeric_limits<float>::min();  // top_p was above 0 in float64
        tokens = empty(logits, {rows}, ScalarType::Long);
        logprobs = empty(logits, {rows}, ScalarType::Float);
        top_ids = empty(logits, {rows, top}, ScalarType::Long);
        top_logprobs = empty(logits, {rows, top}, ScalarType::Float);
        args = {.logits = {logits.const_data_ptr(), dtype(logits)},
                .stride = logits.stride(0),
                .rows = rows,
                .vocab = vocab,
                .same = {static_cast<float>(temperature), top_k,
                         std::max(static_cast<float>(top_p), smallest), static_cast<float>(min_p), 0, 0},
                .temperatures = float32(temperatures),
                .top_ks = top_ks ? indices(*top_ks) : IndexArray{nullptr, false},
                .top_ps = float32(top_ps),
                .min_ps = float32(min_ps),
                .seeds = static_cast<const int64_t*>(seeds.const_data_ptr()),
                .offsets = static_cast<const int64_t*>(offsets.const_data_ptr()),
                .tokens = data<int64_t>(tokens),
                .logprobs = data<float>(logprobs),
                .top = top,
                .top_ids = data<int64_t>(top_ids),
                .top_logprobs = data<float>(top_logprobs)};
        if constexpr (!kReadable) return;
        for (int64_t r = 0; r < rows; ++r) {
            const SampleOptions o = options_of(args, r);
            require_valid(o.temperature, o.top_k, o.top_p, o.min_p);
        }
    }

    std::tuple<Tensor, Tensor, Tensor, Tensor> results() const {
        return {tokens, logprobs, top_ids, top_logprobs};
    }

  private:
    // The conditions are written so that NaN fails.
    static void require_valid(double temperature, int64_t top_k, double top_p, double min_p) {
        require(temperature >= 0.0 && temperature <= std::numeric_limits<float>::max(), "temperature");
        require(top_k >= 0, "top_k");
        require(top_p > 0.0 && top_p <= 1.0, "top_p");
        require(min_p >= 0.0 && min_p <= 1.0, "min_p");
    }
};

}  // namespace tts::ops
