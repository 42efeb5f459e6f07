// Attention of single queries to keys and values in pages, each read once and where it is: a softmax in float32.

#include <cmath>
#include <cstdint>
#include <vector>

#include "native.h"

namespace {

constexpr long kAlone = 1 << 15;  // numbers

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// exp(x) for x up to 0, to two roundings: 2^n times a polynomial on half an octave each way (Cephes' expf).
INLINE Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);  // towards zero: the nearest, for x up to 0
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints bits = (n + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof(bits));
  return p * power;
}

INLINE float dot(const float* a, const float* b, long width) {
  Floats sum{}, other{};
  long d = 0;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
    sum += loaded<Floats>(a + d) * loaded<Floats>(b + d);
    other += loaded<Floats>(a + d + kLanes) * loaded<Floats>(b + d + kLanes);
  }
  for (; d + kLanes <= width; d += kLanes) sum += loaded<Floats>(a + d) * loaded<Floats>(b + d);
  float rest = summed(sum + other);
  for (; d < width; ++d) rest += a[d] * b[d];
  return rest;
}

INLINE void add(float* to, const float* from, float factor, long width) {
  long d = 0;
  for (; d + kLanes <= width; d += kLanes) stored(to + d, loaded<Floats>(to + d) + loaded<Floats>(from + d) * factor);
  for (; d < width; ++d) to[d] += from[d] * factor;
}

// Keys and values are results too, the same memory: a program that goes on with them has no reason to copy them.
// q (queries, heads, width); keys and values (…, pages, places, kv_heads, width); table (queries, n); lengths (queries,).
ffi::Error attend_pages(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> keys,
                        ffi::Buffer<ffi::F32> values, ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> lengths,
                        ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32>, ffi::ResultBuffer<ffi::F32>,
                        float scale, float softcap, int64_t window) {
  const long queries = q.dimensions()[0], heads = q.dimensions()[1], width = q.dimensions()[2];
  const auto shape = keys.dimensions();
  const long places = shape[shape.size() - 3], kv_heads = shape[shape.size() - 2];
  const long pages = keys.element_count() / (places * kv_heads * width);
  const long held = table.dimensions()[1], group = heads / kv_heads, stride = kv_heads * width;
  long read = 0;
  for (long row = 0; row < queries; ++row) read += std::clamp<long>(lengths.typed_data()[row], 0, held * places);
  const std::function<void(long)> attend = [&](long task) {
    const long row = task / kv_heads, kv = task % kv_heads;
    const long length = std::clamp<long>(lengths.typed_data()[row], 0, held * places);
    const long begin = window > 0 ? std::max<long>(0, length - window) : 0, count = length - begin;
    const long room = (count + kLanes - 1) / kLanes * kLanes;
    const float* own = q.typed_data() + (row * heads + kv * group) * width;
    float* result = out->typed_data() + (row * heads + kv * group) * width;
    const int32_t* numbers = table.typed_data() + row * held;
    std::fill_n(result, group * width, 0.0f);
    if (count == 0) return;
    auto at = [&](long position) {
      const long page = std::clamp<long>(numbers[position / places], 0, pages - 1);
      return (page * places + position % places) * stride + kv * width;
    };
    std::vector<float> scores(group * room, -INFINITY);
    for (long i = 0; i < count; ++i) {
      const float* key = keys.typed_data() + at(begin + i);
      for (long g = 0; g < group; ++g) {
        const float score = scale * dot(own + g * width, key, width);
        scores[g * room + i] = softcap > 0 ? softcap * std::tanh(score / softcap) : score;
      }
    }
    for (long g = 0; g < group; ++g) {
      float* mine = scores.data() + g * room;
      const float most = *std::max_element(mine, mine + count);
      Floats total{};
      for (long i = 0; i < room; i += kLanes) stored(mine + i, exponential(loaded<Floats>(mine + i) - most));
      std::fill(mine + count, mine + room, 0.0f);
      for (long i = 0; i < room; i += kLanes) total += loaded<Floats>(mine + i);
      const float inverse = 1.0f / summed(total);
      for (long i = 0; i < count; ++i) mine[i] *= inverse;
    }
    for (long i = 0; i < count; ++i) {
      const float* value = values.typed_data() + at(begin + i);
      for (long g = 0; g < group; ++g) add(result + g * width, value, scores[g * room + i], width);
    }
  };
  // To wake a thread takes longer than to read this little.
  if (read * stride < kAlone) {
    for (long task = 0; task < queries * kv_heads; ++task) attend(task);
  } else {
    share(pool, queries * kv_heads, attend);
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
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"));
