// tree_attention in bfloat16 with AMX tiles (tree_attention_amx.h); for float32 and float16 the kernel of
// AVX-512 is used. Scratch and the merging of states need no products, so they are always those of AVX-512.
#include "tree_attention_amx.h"

#include "tree_attention.h"
#include "tree_attention_finish.h"

namespace tts {
namespace avx512 {

extern decltype(TTS_ISA::tree_attention) tree_attention;

}  // namespace avx512
}  // namespace tts

TTS_BEGIN_ISA

void tree_attention(const TreeAttentionArgs& args, WorkItem work, float* scratch) {
    if (args.dtype != DType::bf16) return avx512::tree_attention(args, work, scratch);
    const AmxTiles state(kTileLines);
    Item<bf16> item(args, work, scratch);
    for (int64_t i = item.task.seg_begin; i < item.task.seg_end; ++i) {
        const Segment& segment = args.segments[i];
        AmxSegment run(item, segment);
        if (item.num_lanes(segment) <= kNarrow) {
            run.run(work.head_begin, work.head_end);
            continue;
        }
        for (int64_t head = work.head_begin; head < work.head_end; ++head) run.run(head, head + 1);
    }
    for (int64_t head = work.head_begin; head < work.head_end; ++head) {
        item.select(head);
        finish_rows(item);
    }
}

TTS_END_ISA
