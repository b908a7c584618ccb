// torch.ops.tts_kernels.quantize_rows, dequantize_rows
#include "rows.h"

namespace tts::ops {
namespace {

// Numbers per thread. With fewer, the work costs less than waking a second thread.
constexpr int64_t kNumbersPerThread = 16384;

int64_t grain(int64_t width) { return 1 + kNumbersPerThread / (width + 1); }

Tensor quantize_rows(const Tensor& x_in, int64_t bits, int64_t group_size) {
    const Tensor x = dense_rows(x_in);
    const RowFormat format = row_format(x.size(1), bits, group_size);
    const int64_t count = x.size(0);
    const DType type = dtype(x);
    Tensor out = empty(x, {count, format.bytes()}, ScalarType::Byte);
    const QuantizeRowsArgs args{.x = {x.const_data_ptr(), type},
                                .stride = x.stride(0),
                                .format = format,
                                .out = static_cast<uint8_t*>(out.mutable_data_ptr())};
    parallel_for(0, count, grain(format.width),
                 [&](int64_t begin, int64_t end) { kernels().quantize_rows(args, begin, end); });
    return out;
}

Tensor dequantize_rows(const Tensor& rows_in, int64_t width, int64_t bits, int64_t group_size,
                       ScalarType type) {
    const RowFormat format = row_format(width, bits, group_size);
    require(is_here(rows_in) && rows_in.scalar_type() == ScalarType::Byte && rows_in.dim() == 2, "rows");
    require(rows_in.size(1) == format.bytes(), "rows");
    const Tensor rows = dense(rows_in);
    const int64_t count = rows.size(0);
    Tensor out = empty(rows, {count, width}, type);
    const DequantizeRowsArgs args{.rows = static_cast<const uint8_t*>(rows.const_data_ptr()),
                                  .stride = rows.size(1),
                                  .format = format,
                                  .dtype = dtype(out),
                                  .out = out.mutable_data_ptr()};
    parallel_for(0, count, grain(width),
                 [&](int64_t begin, int64_t end) { kernels().dequantize_rows(args, begin, end); });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tts_kernels, m) {
    m.def("quantize_rows(Tensor x, int bits, int group_size) -> Tensor");
    m.def("dequantize_rows(Tensor rows, int width, int bits, int group_size, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tts_kernels, CPU, m) {
    m.impl("quantize_rows", TTS_BOX(&quantize_rows));
    m.impl("dequantize_rows", TTS_BOX(&dequantize_rows));
}

}  // namespace tts::ops
