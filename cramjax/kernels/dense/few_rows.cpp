// Products of a few rows with a matrix that is read from memory once, in the form it is kept in: y = x w.
//
// It is compiled on the machine that runs it (cramjax/kernels/native.py), so that its vectors are as wide as that one's.
// Sums are float32. A matrix (inner, outer) lies in memory row after row, as weights do, or column after column, as an
// embedding does that is the head as well. Chunks of columns are shared between XLA's threads.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "native.h"

namespace {

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef uint8_t Pairs __attribute__((vector_size(kLanes)));

// Integers of a vector's lanes, widened. GCC 12 takes them one by one where it is not told how.
#if defined(__AVX512F__)
INLINE Ints widened(const int8_t* from) { return (Ints)_mm512_cvtepi8_epi32(loaded<__m128i>(from)); }
INLINE Ints widened(const uint8_t* from) { return (Ints)_mm512_cvtepu8_epi32(loaded<__m128i>(from)); }
INLINE Words widened(const uint16_t* from) { return (Words)_mm512_cvtepu16_epi32(loaded<__m256i>(from)); }
#elif defined(__AVX2__)
INLINE Ints widened(const int8_t* from) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
INLINE Ints widened(const uint8_t* from) { return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
INLINE Words widened(const uint16_t* from) { return (Words)_mm256_cvtepu16_epi32(loaded<__m128i>(from)); }
#else
INLINE Ints widened(const int8_t* from) { return __builtin_convertvector(loaded<Bytes>(from), Ints); }
INLINE Ints widened(const uint8_t* from) { return __builtin_convertvector(loaded<Pairs>(from), Ints); }
INLINE Words widened(const uint16_t* from) { return __builtin_convertvector(loaded<Halves>(from), Words); }
#endif

// A kind of weight: how many rows of the matrix one row in memory holds, and these as floats, a vector or one at a time.
struct Float32 {
  using Kept = float;
  static constexpr int kRows = 1;
  static INLINE void vectors(const float* w, Floats* out) { out[0] = loaded<Floats>(w); }
  static INLINE void scalars(const float* w, float* out) { out[0] = *w; }
};

struct BFloat16 {
  using Kept = uint16_t;
  static constexpr int kRows = 1;
  static INLINE void vectors(const uint16_t* w, Floats* out) {
    const Words bits = widened(w) << 16;
    std::memcpy(out, &bits, sizeof(bits));
  }
  static INLINE void scalars(const uint16_t* w, float* out) {
    const uint32_t bits = static_cast<uint32_t>(*w) << 16;
    std::memcpy(out, &bits, sizeof(bits));
  }
};

struct Int8 {
  using Kept = int8_t;
  static constexpr int kRows = 1;
  static INLINE void vectors(const int8_t* w, Floats* out) {
    out[0] = __builtin_convertvector(widened(w), Floats);
  }
  static INLINE void scalars(const int8_t* w, float* out) { out[0] = static_cast<float>(*w); }
};

// Two rows in a byte, the even one in the low bits; codes are kept plus 8, which the caller takes off.
struct Int4 {
  using Kept = uint8_t;
  static constexpr int kRows = 2;
  static INLINE void vectors(const uint8_t* w, Floats* out) {
    const Ints both = widened(w);
    out[0] = __builtin_convertvector(both & 15, Floats);
    out[1] = __builtin_convertvector(both >> 4, Floats);
  }
  static INLINE void scalars(const uint8_t* w, float* out) {
    out[0] = static_cast<float>(*w & 15);
    out[1] = static_cast<float>(*w >> 4);
  }
};

// Adds to `rows` sums of `width` columns what R rows in memory give.
template <class Kind, int B, int R>
INLINE void add(const typename Kind::Kept* w, long stride, const float* x, long inner, float* sums, long width) {
  constexpr int kRows = R * Kind::kRows;
  long n = 0;
  for (; n + 2 * kLanes <= width; n += 2 * kLanes) {
    Floats left[kRows], right[kRows];
    for (int r = 0; r < R; ++r) {
      const auto* at = w + r * stride + n;
      __builtin_prefetch(at + 2 * R * stride);
      Kind::vectors(at, left + r * Kind::kRows);
      Kind::vectors(at + kLanes, right + r * Kind::kRows);
    }
    for (int b = 0; b < B; ++b) {
      float* sum = sums + b * width + n;
      Floats s = loaded<Floats>(sum), t = loaded<Floats>(sum + kLanes);
      for (int r = 0; r < kRows; ++r) {
        const float factor = x[b * inner + r];
        s += left[r] * factor;
        t += right[r] * factor;
      }
      stored(sum, s);
      stored(sum + kLanes, t);
    }
  }
  for (; n < width; ++n) {
    float column[kRows];
    for (int r = 0; r < R; ++r) Kind::scalars(w + r * stride + n, column + r * Kind::kRows);
    for (int b = 0; b < B; ++b)
      for (int r = 0; r < kRows; ++r) sums[b * width + n] += column[r] * x[b * inner + r];
  }
}

struct Problem {
  const void* w;
  long inner, outer, rows;
  const float* x;        // (B, inner), padded with rows of zeros
  const float* scale;    // (groups, outer); null: none
  const float* zero;     // like scale; null: 0
  const float* x_sums;   // (B, groups): of each group's inputs
  long groups;
  float shift;           // added to zero
  float* y;              // (rows, outer)
};

// Columns from `begin` on, of a matrix that lies in memory row after row.
template <class Kind, int B>
void by_rows(const Problem& p, long begin, long width) {
  constexpr int R = Kind::kRows == 2 ? 2 : 4;
  std::vector<float> total(B * width, 0.0f), part(p.scale ? B * width : 0);
  const auto* w = static_cast<const typename Kind::Kept*>(p.w) + begin;
  const long group = p.inner / p.groups;
  for (long g = 0; g < p.groups; ++g) {
    float* sums = total.data();
    if (p.scale) {
      std::fill(part.begin(), part.end(), 0.0f);
      sums = part.data();
    }
    const long last = (g + 1) * group / Kind::kRows;
    long k = g * group / Kind::kRows;
    for (; k + R <= last; k += R)
      add<Kind, B, R>(w + k * p.outer, p.outer, p.x + k * Kind::kRows, p.inner, sums, width);
    for (; k < last; ++k) add<Kind, B, 1>(w + k * p.outer, p.outer, p.x + k * Kind::kRows, p.inner, sums, width);
    if (!p.scale) continue;
    const float* scale = p.scale + g * p.outer + begin;
    const float* zero = p.zero ? p.zero + g * p.outer + begin : nullptr;
    for (int b = 0; b < B; ++b) {
      const float x_sum = p.x_sums[b * p.groups + g], shifted = p.shift * x_sum;
      float *to = total.data() + b * width, *from = part.data() + b * width;
      if (zero)
        for (long n = 0; n < width; ++n) to[n] += scale[n] * (from[n] - shifted - zero[n] * x_sum);
      else
        for (long n = 0; n < width; ++n) to[n] += scale[n] * (from[n] - shifted);
    }
  }
  for (long b = 0; b < p.rows; ++b) std::copy_n(total.data() + b * width, width, p.y + b * p.outer + begin);
}

// R columns of a matrix that lies in memory column after column.
template <class Kind, int B, int R>
INLINE void dots(const Problem& p, long column) {
  const auto* w = static_cast<const typename Kind::Kept*>(p.w) + column * p.inner;
  Floats sums[R][B] = {};
  long k = 0;
  for (; k + kLanes <= p.inner; k += kLanes) {
    Floats own[R];
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(w + (r + R) * p.inner + k);
      Kind::vectors(w + r * p.inner + k, own + r);
    }
    for (int b = 0; b < B; ++b) {
      const Floats x = loaded<Floats>(p.x + b * p.inner + k);
      for (int r = 0; r < R; ++r) sums[r][b] += own[r] * x;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (long b = 0; b < B && b < p.rows; ++b) {
      float sum = 0.0f;
      for (int lane = 0; lane < kLanes; ++lane) sum += sums[r][b][lane];
      for (long rest = k; rest < p.inner; ++rest) {
        float one;
        Kind::scalars(w + r * p.inner + rest, &one);
        sum += one * p.x[b * p.inner + rest];
      }
      p.y[b * p.outer + column + r] = sum;
    }
  }
}

template <class Kind, int B>
void by_columns(const Problem& p, long begin, long width) {
  constexpr int R = B == 8 ? 1 : B == 4 ? 2 : 4;
  long n = begin;
  for (; n + R <= begin + width; n += R) dots<Kind, B, R>(p, n);
  for (; n < begin + width; ++n) dots<Kind, B, 1>(p, n);
}

template <class Kind>
void multiply(ffi::ThreadPool& pool, const Problem& p, bool columns) {
  const long padded = p.rows <= 2 ? p.rows : p.rows <= 4 ? 4 : 8;
  // Sums of a chunk stay in the first cache; a chunk is at least some lines of it wide, whole ones.
  const long line = 64 / sizeof(typename Kind::Kept), threads = std::max<long>(1, pool.num_threads());
  const long most = columns ? p.outer : 4096 / padded, least = columns ? 64 : 4 * line;
  long width = std::max(least, std::min(most, (p.outer + 2 * threads - 1) / (2 * threads)));
  width = (width + line - 1) / line * line;
  auto run = [&](auto of_rows, auto of_columns) {
    share(pool, (p.outer + width - 1) / width, [&](long i) {
      (columns ? of_columns : of_rows)(p, i * width, std::min(width, p.outer - i * width));
    });
  };
  constexpr bool kWhole = Kind::kRows == 1;  // pairs of rows have no columns apart
  using Single = std::conditional_t<kWhole, Kind, Float32>;
  switch (padded) {
    case 1: return run(&by_rows<Kind, 1>, &by_columns<Single, 1>);
    case 2: return run(&by_rows<Kind, 2>, &by_columns<Single, 2>);
    case 4: return run(&by_rows<Kind, 4>, &by_columns<Single, 4>);
    default: return run(&by_rows<Kind, 8>, &by_columns<Single, 8>);
  }
}

// x (rows, inner); w one matrix or a stack of them, of which `layer` says which; scale and zero are empty, or like w with
// groups in the place of inner.
ffi::Error few_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> layer,
                    ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> zero, ffi::ResultBuffer<ffi::F32> y,
                    bool columns) {
  const auto shape = w.dimensions();
  const bool stacked = shape.size() == 3;
  const long rows = x.dimensions()[0], inner = x.dimensions()[1], outer = y->dimensions()[1];
  if (rows < 1 || rows > 8) return ffi::Error::InvalidArgument("rows must be 1 to 8");
  const long index = stacked ? std::clamp<long>(*layer.typed_data(), 0, shape[0] - 1) : 0;
  const long padded = rows <= 2 ? rows : rows <= 4 ? 4 : 8;
  std::vector<float> own(padded * inner, 0.0f);
  std::copy_n(x.typed_data(), rows * inner, own.data());
  Problem p{};
  p.inner = inner, p.outer = outer, p.rows = rows, p.x = own.data(), p.y = y->typed_data(), p.groups = 1;
  std::vector<float> x_sums;
  if (scale.element_count() > 0) {
    p.groups = scale.dimensions()[scale.dimensions().size() - 2];
    p.scale = scale.typed_data() + index * p.groups * outer;
    if (zero.element_count() > 0) p.zero = zero.typed_data() + index * p.groups * outer;
    x_sums.assign(padded * p.groups, 0.0f);
    const long group = inner / p.groups;
    for (long b = 0; b < padded; ++b)
      for (long k = 0; k < inner; ++k) x_sums[b * p.groups + k / group] += own[b * inner + k];
    p.x_sums = x_sums.data();
  }
  const long matrix = shape[shape.size() - 1] * shape[shape.size() - 2];
  const auto* bytes = static_cast<const uint8_t*>(w.untyped_data());
  switch (w.element_type()) {
    case ffi::F32: p.w = bytes + index * matrix * 4; multiply<Float32>(pool, p, columns); break;
    case ffi::BF16: p.w = bytes + index * matrix * 2; multiply<BFloat16>(pool, p, columns); break;
    case ffi::S8: p.w = bytes + index * matrix; multiply<Int8>(pool, p, columns); break;
    case ffi::U8: p.w = bytes + index * matrix, p.shift = 8.0f; multiply<Int4>(pool, p, columns); break;
    default: return ffi::Error::InvalidArgument("weights must be float32, bfloat16, int8 or uint8");
  }
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
                                  .Attr<bool>("columns"));
