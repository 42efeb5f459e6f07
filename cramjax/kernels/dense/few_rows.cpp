// Products of rows with a matrix, eight at a time: y = x w. Chunks of columns are shared between XLA's threads.

#include "dense/products.h"

namespace {

constexpr long kSecondCache = 1 << 18;  // bytes of weights that stay there, while eight rows after eight read them

// x (rows, inner); w one matrix or a stack of them, of which `layer` says which.
ffi::Error few_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> layer,
                    ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> zero, ffi::ResultBuffer<ffi::F32> y,
                    bool rounds) {
  if (!bits_of(w.element_type()))
    return ffi::Error::InvalidArgument("weights must be float32, bfloat16, int8 or uint8");
  const Matrix m = matrix_of(w, scale, zero, *layer.typed_data());
  if (x.element_count() == 0) return ffi::Error::Success();
  const long rows = x.dimensions()[0], blocks = (rows + kMostRows - 1) / kMostRows;
  if (rounds && m.inner / m.groups % 4)
    return ffi::Error::InvalidArgument("groups must be of a multiple of 4 inputs");
  std::vector<Inputs> inputs(blocks);
  for (long i = 0; i < blocks; ++i) {
    const long first = i * kMostRows;
    inputs[i].read(x.typed_data() + first * m.inner, m.inner, std::min(kMostRows, rows - first), m, rounds);
  }
  long width = columns_at_once(m, inputs[0].padded, pool.num_threads());
  if (blocks > 1) {
    const long stay = kSecondCache * 8 / (m.inner * bits_of(m.kind)), line = 4 * kLanes;
    width = std::min(width, std::max(line, stay / line * line));
  }
  share(pool, (m.outer + width - 1) / width, [&](long i) {
    const long begin = i * width, own = std::min(width, m.outer - begin);
    for (long block = 0; block < blocks; ++block)
      columns(m, inputs[block], begin, own, y->typed_data() + block * kMostRows * m.outer + begin, m.outer);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cramjax_few_rows, few_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("rounds"));
