// Attention of single queries to keys and values in pages, which new ones are written into first.

#include "attention/attend.h"

namespace {

constexpr long kAlone = 1 << 15;  // numbers

// Keys and values are results too, the same memory: a program that goes on with them has no reason to copy them.
// q (queries, heads, width); k and v (queries, kv_heads, width); keys and values (…, pages, places, kv_heads, width);
// table (queries, n); lengths (queries,), the new key counted.
ffi::Error attend_pages(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                        ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::F32> keys, ffi::Buffer<ffi::F32> values,
                        ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> lengths, ffi::ResultBuffer<ffi::F32> out,
                        ffi::ResultBuffer<ffi::F32> new_keys, ffi::ResultBuffer<ffi::F32> new_values, float scale,
                        float softcap, int64_t window) {
  const long queries = q.dimensions()[0], heads = q.dimensions()[1], width = q.dimensions()[2];
  const auto shape = keys.dimensions();
  const long places = shape[shape.size() - 3], kv_heads = shape[shape.size() - 2], group = heads / kv_heads;
  const long pages = keys.element_count() / (places * kv_heads * width);
  const Pages p{new_keys->typed_data(), new_values->typed_data(), pages, places, kv_heads, width,
                table.typed_data(), lengths.typed_data(), table.dimensions()[1]};
  // Others' texts may share a page that is written here: all is written before anything is read.
  long read = 0;
  for (long row = 0; row < queries; ++row) {
    const long length = p.length(row);
    read += length;
    for (long kv = 0; kv < kv_heads && length > 0; ++kv) {
      const long to = p.at(row, length - 1, kv), from = (row * kv_heads + kv) * width;
      std::copy_n(k.typed_data() + from, width, p.keys + to);
      std::copy_n(v.typed_data() + from, width, p.values + to);
    }
  }
  const Scores s{scale, softcap, static_cast<long>(window)};
  const std::function<void(long)> run = [&](long task) {
    const long row = task / kv_heads, kv = task % kv_heads, first = (row * heads + kv * group) * width;
    attend(p, s, row, kv, group, q.typed_data() + first, out->typed_data() + first);
  };
  // To wake a thread takes longer than to read this little.
  if (read * kv_heads * width < kAlone) {
    for (long task = 0; task < queries * kv_heads; ++task) run(task);
  } else {
    share(pool, queries * kv_heads, run);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cramjax_attend_pages, attend_pages,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"));
