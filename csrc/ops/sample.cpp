// torch.ops.tts_kernels.sample
#include "sample.h"

#include <algorithm>
#include <cmath>

namespace tts::ops {
namespace {

// Memory for one row at a time. Most of it is never touched, because lists are short.
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

// The steps for one row; `over_blocks` runs a step for all blocks, in any order.
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

// Writes row r of top_ids and top_logprobs; nothing for a row without a token.
void tell_likeliest(const SampleRow& row, const SampleWorkspace& space, const SampleDraw& d,
                    const SampleArgs& args, int64_t r) {
    int64_t* ids = args.top_ids + r * args.top;
    float* values = args.top_logprobs + r * args.top;
    if (d.token < 0) {
        std::fill_n(ids, args.top, -1);
        std::fill_n(values, args.top, std::nanf(""));
        return;
    }
    kernels().sample_likeliest(row, space, args.top, ids, values);
    const double own = args.logprobs[r], infinity = std::numeric_limits<double>::infinity();
    const double drawn = values[0] == infinity ? infinity : d.logit;
    for (int64_t i = 0; i < args.top;
         ++i) {  // +inf minus itself is NaN: what equals the drawn one is as likely
        const double value = values[i];
        values[i] = static_cast<float>(value == drawn ? own : value - drawn + own);
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample(const Tensor& logits, const Tensor& seeds,
                                                  const Tensor& offsets, double temperature, int64_t top_k,
                                                  double top_p, double min_p,
                                                  const std::optional<Tensor>& temperatures,
                                                  const std::optional<Tensor>& top_ks,
                                                  const std::optional<Tensor>& top_ps,
                                                  const std::optional<Tensor>& min_ps, int64_t top_logprobs) {
    const Sampling sampling(logits, seeds, offsets, temperature, top_k, top_p, min_p, temperatures, top_ks,
                            top_ps, min_ps, top_logprobs);
    const SampleArgs& args = sampling.args;
    const int64_t rows = args.rows, vocab = args.vocab;
    const char* base = static_cast<const char*>(args.logits.data);
    const int64_t stride = args.stride * logits.element_size();
    const auto one_row = [&](int64_t r, SampleWorkspace& space, auto over_blocks) {
        const SampleRow row{{base + r * stride, args.logits.dtype}, vocab, options_of(args, r)};
        const SampleDraw d = draw(row, space, [&](auto step) { over_blocks(step, row); });
        args.tokens[r] = d.token;
        args.logprobs[r] = logprob(d);
        if (args.top) tell_likeliest(row, space, d, args, r);
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
        return sampling.results();
    }
    std::vector<Workspace> workspaces;  // one for each thread
    for (int64_t who = 0; who < threads_for(rows, rows); ++who) workspaces.emplace_back(logits, vocab);
    for_units(rows, rows, [&](int64_t r, int64_t who) {
        SampleWorkspace& space = workspaces[static_cast<size_t>(who)].space;
        one_row(r, space, [&](auto step, const SampleRow& row) { step(row, space, 0, blocks); });
    });
    return sampling.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def(
        "sample(Tensor logits, Tensor seeds, Tensor offsets, float temperature, int top_k, float top_p, "
        "float min_p, "
        "Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, int top_logprobs) -> (Tensor, "
        "Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) { m.impl("sample", TTS_BOX(&sample)); }

}  // namespace tts::ops
