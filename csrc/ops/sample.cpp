// torch.ops.tts_kernels.sample
#include <algorithm>
#include <cmath>
#include <limits>

#include "common.h"

namespace tts::ops {
namespace {

// Options of each row: a tensor where there is one, else the number.
class Options {
  public:
    Options(const Tensor& seeds, const Tensor& offsets, double temperature, int64_t top_k, double top_p,
            double min_p, const std::optional<Tensor>& temperatures, const std::optional<Tensor>& top_ks,
            const std::optional<Tensor>& top_ps, const std::optional<Tensor>& min_ps)
        : same_{static_cast<float>(temperature), top_k, static_cast<float>(top_p),
                static_cast<float>(min_p),       0,     0},
          seeds_(static_cast<const int64_t*>(seeds.const_data_ptr())),
          offsets_(static_cast<const int64_t*>(offsets.const_data_ptr())),
          temperatures_(float32(temperatures)),
          top_ps_(float32(top_ps)),
          min_ps_(float32(min_ps)) {
        require_valid(temperature, top_k, top_p, min_p);
        if (same_.top_p < kSmallest) same_.top_p = kSmallest;  // it was above 0 in float64
        if (top_ks) top_ks_ = indices(*top_ks);
    }

    SampleOptions operator[](int64_t row) const {
        SampleOptions options = same_;
        if (temperatures_) options.temperature = temperatures_[row];
        if (top_ks_.data) options.top_k = at(top_ks_, row);
        if (top_ps_) options.top_p = top_ps_[row];
        if (min_ps_) options.min_p = min_ps_[row];
        options.seed = seeds_[row];
        options.offset = offsets_[row];
        return options;
    }

    void require_valid(int64_t rows) const {
        for (int64_t r = 0; r < rows; ++r) {
            const SampleOptions o = (*this)[r];
            require_valid(o.temperature, o.top_k, o.top_p, o.min_p);
        }
    }

    // Written so that NaN fails.
    static void require_valid(double temperature, int64_t top_k, double top_p, double min_p) {
        require(temperature >= 0.0 && temperature <= kLargest, "temperature");
        require(top_k >= 0, "top_k");
        require(top_p > 0.0 && top_p <= 1.0, "top_p");
        require(min_p >= 0.0 && min_p <= 1.0, "min_p");
    }

  private:
    static constexpr float kSmallest = std::numeric_limits<float>::min(),
                           kLargest = std::numeric_limits<float>::max();
    SampleOptions same_;
    const int64_t *seeds_, *offsets_;
    const float *temperatures_, *top_ps_, *min_ps_;
    IndexArray top_ks_{nullptr, false};
};

// Memory for one row at a time. Most of it is never touched: lists are short.
class Workspace {
  public:
    Workspace(const Tensor& like, int64_t vocab) {
        const int64_t blocks = divide_up(vocab, kSampleBlock), entries = blocks * kSampleBlock;
        const auto bytes = [](int64_t n, int64_t size) { return (n * size + 63) / 64 * 64; };
        const int64_t sizes[] = {bytes(blocks, sizeof(SampleBlock)), bytes(entries, 4), bytes(entries, 4),
                                 bytes(entries + 16, 8)};
        memory_ = empty(like, {sizes[0] + sizes[1] + sizes[2] + sizes[3]}, ScalarType::Byte);
        uint8_t* p = data<uint8_t>(memory_);
        space.blocks = reinterpret_cast<SampleBlock*>(p);
        space.list = reinterpret_cast<float*>(p += sizes[0]);
        space.picked = reinterpret_cast<float*>(p += sizes[1]);
        space.weights = reinterpret_cast<uint64_t*>(p += sizes[2]);
    }

    SampleWorkspace space{};

  private:
    Tensor memory_;
};

// The steps of one row; `over_blocks` calls a step for all blocks, in any order.
template <class OverBlocks>
SampleDraw draw(const SampleRow& row, SampleWorkspace& space, OverBlocks over_blocks) {
    SampleDraw result;
    over_blocks(kernels().sample_scan);
    if (!kernels().sample_plan(row, space, result)) return result;
    do over_blocks(kernels().sample_weigh);
    while (!kernels().sample_draw(row, space, result));
    return result;
}

float logprob(const SampleDraw& d) {
    if (d.token < 0) return std::nanf("");
    const double sum = std::ldexp(static_cast<double>(d.untempered), -39);
    return static_cast<float>(static_cast<double>(d.logit) - static_cast<double>(d.max) - std::log(sum));
}

std::tuple<Tensor, Tensor> sample(const Tensor& logits_in, const Tensor& seeds_in, const Tensor& offsets_in,
                                  double temperature, int64_t top_k, double top_p, double min_p,
                                  const std::optional<Tensor>& temperatures,
                                  const std::optional<Tensor>& top_ks, const std::optional<Tensor>& top_ps,
                                  const std::optional<Tensor>& min_ps) {
    require(logits_in.dim() == 2, "logits");
    const bool strided = logits_in.size(1) > 1 && logits_in.stride(1) != 1;
    const Tensor logits = strided ? torch::stable::contiguous(logits_in) : logits_in;
    const Tensor seeds = dense(seeds_in), offsets = dense(offsets_in);
    const int64_t rows = logits.size(0), vocab = logits.size(1);
    const auto one_a_row = [&](const Tensor& t) { return t.is_cpu() && t.dim() == 1 && t.size(0) == rows; };
    const auto absent_or_one_a_row = [&](const std::optional<Tensor>& t) { return !t || one_a_row(*t); };
    require(vocab >= 1 && vocab <= int64_t{1} << 24, "logits");
    require(one_a_row(seeds) && seeds.scalar_type() == ScalarType::Long, "seeds");
    require(one_a_row(offsets) && offsets.scalar_type() == ScalarType::Long, "offsets");
    require(absent_or_one_a_row(temperatures) && absent_or_one_a_row(top_ks) && absent_or_one_a_row(top_ps) &&
                absent_or_one_a_row(min_ps),
            "options");
    const Options options(seeds, offsets, temperature, top_k, top_p, min_p, temperatures, top_ks, top_ps,
                          min_ps);
    options.require_valid(rows);

    const DType type = dtype(logits);
    const char* base = static_cast<const char*>(logits.const_data_ptr());
    const int64_t stride = logits.stride(0) * (type == DType::f32 ? 4 : 2);
    Tensor tokens = empty(logits, {rows}, ScalarType::Long),
           logprobs = empty(logits, {rows}, ScalarType::Float);
    int64_t* token = data<int64_t>(tokens);
    float* token_logprob = data<float>(logprobs);
    const auto one_row = [&](int64_t r, SampleWorkspace& space, auto over_blocks) {
        const SampleRow row{{base + r * stride, type}, vocab, options[r]};
        const SampleDraw d = draw(row, space, [&](auto step) { over_blocks(step, row); });
        token[r] = d.token;
        token_logprob[r] = logprob(d);
    };

    const int64_t blocks = divide_up(vocab, kSampleBlock), chunks = divide_up(blocks, kSampleChunk);
    if (rows <
        static_cast<int64_t>(torch::stable::get_num_threads())) {  // one row after the other, each cut up
        Workspace workspace(logits, vocab);
        SampleWorkspace& space = workspace.space;
        for (int64_t r = 0; r < rows; ++r) {
            one_row(r, space, [&](auto step, const SampleRow& row) {
                parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
                    step(row, space, begin * kSampleChunk, std::min(end * kSampleChunk, blocks));
                });
            });
        }
        return {tokens, logprobs};
    }
    parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        Workspace workspace(logits, vocab);
        SampleWorkspace& space = workspace.space;
        for (int64_t r = begin; r < end; ++r) {
            one_row(r, space, [&](auto step, const SampleRow& row) { step(row, space, 0, blocks); });
        }
    });
    return {tokens, logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def(
        "sample(Tensor logits, Tensor seeds, Tensor offsets, float temperature, int top_k, float top_p, "
        "float min_p, "
        "Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("sample", TTS_BOX(&sample)); }

}  // namespace tts::ops
