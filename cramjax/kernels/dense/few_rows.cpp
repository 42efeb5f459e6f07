// Products of a few rows with a matrix that is read from memory once, in the form it is kept in: y = x w.
//
// It is compiled on the machine that runs it (cramjax/kernels/native.py), so that its vectors are as wide as that one's.
// Sums are float32. A matrix (inner, outer) lies in memory row after row. Chunks of columns are shared between XLA's
// threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
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

// Whole numbers of 32 bits that sums of products of bytes lie in, in any order until `ordered`. `add_rounded` adds to
// `rows` sums of `width` columns what 4 Q rows of the matrix give: times signed bytes `x`, the matrix as unsigned ones.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr long kBlock = 64;

// 64 columns of four rows, as unsigned bytes: those of int8 plus 128, those of int4 plus 8.
INLINE void four_rows(const int8_t* w, long stride, __m512i* rows) {
  for (int r = 0; r < 4; ++r) rows[r] = _mm512_xor_si512(loaded<__m512i>(w + r * stride), _mm512_set1_epi8(-128));
}
INLINE void four_rows(const uint8_t* w, long stride, __m512i* rows) {
  for (int r = 0; r < 2; ++r) {
    const __m512i both = loaded<__m512i>(w + r * stride), low = _mm512_set1_epi8(15);
    rows[2 * r] = _mm512_and_si512(both, low);
    rows[2 * r + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
  }
}

template <class Kind, int B, int Q>
INLINE void add_blocks(const typename Kind::Kept* w, long stride, const int8_t* x, long inner, int32_t* sums,
                       long width) {
  constexpr long kKept = 4 / Kind::kRows;  // rows in memory that hold four
  for (long n = 0; n + kBlock <= width; n += kBlock) {
    __m512i columns[Q][4];
    for (int q = 0; q < Q; ++q) {
      __m512i rows[4];
      for (int r = 0; r < kKept; ++r) __builtin_prefetch(w + (Q + q) * kKept * stride + r * stride + n);
      four_rows(w + q * kKept * stride + n, stride, rows);
      const __m512i a = _mm512_unpacklo_epi8(rows[0], rows[1]), b = _mm512_unpackhi_epi8(rows[0], rows[1]);
      const __m512i c = _mm512_unpacklo_epi8(rows[2], rows[3]), d = _mm512_unpackhi_epi8(rows[2], rows[3]);
      columns[q][0] = _mm512_unpacklo_epi16(a, c), columns[q][1] = _mm512_unpackhi_epi16(a, c);
      columns[q][2] = _mm512_unpacklo_epi16(b, d), columns[q][3] = _mm512_unpackhi_epi16(b, d);
    }
    for (int b = 0; b < B; ++b) {
      __m512i factors[Q];
      for (int q = 0; q < Q; ++q) factors[q] = _mm512_set1_epi32(loaded<int32_t>(x + b * inner + 4 * q));
      for (int i = 0; i < 4; ++i) {
        int32_t* at = sums + b * width + n + 16 * i;
        __m512i sum = loaded<__m512i>(at);
        for (int q = 0; q < Q; ++q) sum = _mm512_dpbusd_epi32(sum, columns[q][i], factors[q]);
        std::memcpy(at, &sum, sizeof(sum));
      }
    }
  }
}

// Lanes of 128 bits of four vectors, as `unpack` left them, to columns in their order.
INLINE void ordered(int32_t* sums, long width) {
  for (long n = 0; n + kBlock <= width; n += kBlock) {
    __m512i v[4], t[4];
    for (int i = 0; i < 4; ++i) v[i] = loaded<__m512i>(sums + n + 16 * i);
    t[0] = _mm512_shuffle_i32x4(v[0], v[1], 0x44), t[1] = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
    t[2] = _mm512_shuffle_i32x4(v[2], v[3], 0x44), t[3] = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_i32x4(t[0], t[2], 0x88), v[1] = _mm512_shuffle_i32x4(t[0], t[2], 0xdd);
    v[2] = _mm512_shuffle_i32x4(t[1], t[3], 0x88), v[3] = _mm512_shuffle_i32x4(t[1], t[3], 0xdd);
    for (int i = 0; i < 4; ++i) std::memcpy(sums + n + 16 * i, &v[i], sizeof(v[i]));
  }
}
#else
constexpr long kBlock = kLanes;

template <class Kind, int B, int Q>
INLINE void add_blocks(const typename Kind::Kept* w, long stride, const int8_t* x, long inner, int32_t* sums,
                       long width) {
  constexpr int kKept = 4 / Kind::kRows * Q;
  for (long n = 0; n + kBlock <= width; n += kBlock) {
    for (int r = 0; r < kKept; ++r) {
      const Ints both = widened(w + r * stride + n);
      for (int b = 0; b < B; ++b) {
        int32_t* at = sums + b * width + n;
        Ints sum = loaded<Ints>(at);
        if constexpr (Kind::kRows == 2)
          sum += (both & 15) * x[b * inner + 2 * r] + (both >> 4) * x[b * inner + 2 * r + 1];
        else
          sum += (both + 128) * x[b * inner + r];
        std::memcpy(at, &sum, sizeof(sum));
      }
    }
  }
}

INLINE void ordered(int32_t*, long) {}
#endif

template <class Kind, int B, int Q>
INLINE void add_rounded(const typename Kind::Kept* w, long stride, const int8_t* x, long inner, int32_t* sums,
                        long width) {
  add_blocks<Kind, B, Q>(w, stride, x, inner, sums, width);
  for (long n = width / kBlock * kBlock; n < width; ++n)
    for (int r = 0; r < 4 * Q / Kind::kRows; ++r) {
      const int kept = w[r * stride + n];
      for (int b = 0; b < B; ++b) {
        const int8_t* own = x + b * inner + r * Kind::kRows;
        sums[b * width + n] += Kind::kRows == 2 ? (kept & 15) * own[0] + (kept >> 4) * own[1] : (kept + 128) * own[0];
      }
    }
}

struct Problem {
  const void* w;
  long inner, outer, rows;
  const float* x;        // (B, inner), padded with rows of zeros
  const float* scale;    // (groups, outer); null: none
  const float* zero;     // like scale; null: 0
  const float* x_sums;   // (B, groups): of each group's inputs
  const int8_t* rounded; // (B, inner): x over `steps`, rounded; null: it is not
  const float* steps;    // (B, groups)
  const int32_t* counts; // (B, groups): of each group's rounded inputs
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

// The same of codes, and of inputs that are rounded too: sums of a group are whole numbers.
template <class Kind, int B>
void by_rounded_rows(const Problem& p, long begin, long width) {
  if constexpr (sizeof(typename Kind::Kept) == 1) {
    constexpr int Q = 2, kOffset = Kind::kRows == 2 ? 8 : 128;
    std::vector<float> total(B * width, 0.0f);
    std::vector<int32_t> sums(B * width);
    const auto* w = static_cast<const typename Kind::Kept*>(p.w) + begin;
    const long group = p.inner / p.groups;
    for (long g = 0; g < p.groups; ++g) {
      for (long b = 0; b < B; ++b)
        std::fill_n(sums.data() + b * width, width, -kOffset * p.counts[b * p.groups + g]);
      const long last = (g + 1) * group;
      long k = g * group;
      for (; k + 4 * Q <= last; k += 4 * Q)
        add_rounded<Kind, B, Q>(w + k / Kind::kRows * p.outer, p.outer, p.rounded + k, p.inner, sums.data(), width);
      for (; k < last; k += 4)
        add_rounded<Kind, B, 1>(w + k / Kind::kRows * p.outer, p.outer, p.rounded + k, p.inner, sums.data(), width);
      const float* scale = p.scale + g * p.outer + begin;
      const float* zero = p.zero ? p.zero + g * p.outer + begin : nullptr;
      for (int b = 0; b < B; ++b) {
        const float step = p.steps[b * p.groups + g], count = p.counts[b * p.groups + g];
        float* to = total.data() + b * width;
        int32_t* from = sums.data() + b * width;
        ordered(from, width);
        if (zero)
          for (long n = 0; n < width; ++n) to[n] += scale[n] * step * (from[n] - zero[n] * count);
        else
          for (long n = 0; n < width; ++n) to[n] += scale[n] * (step * from[n]);
      }
    }
    for (long b = 0; b < p.rows; ++b) std::copy_n(total.data() + b * width, width, p.y + b * p.outer + begin);
  }
}

template <class Kind>
void multiply(ffi::ThreadPool& pool, const Problem& p) {
  const long padded = p.rows <= 2 ? p.rows : p.rows <= 4 ? 4 : 8;
  // Sums of a chunk stay in the first cache; a chunk is at least some lines of it wide, whole ones.
  const long line = 64 / sizeof(typename Kind::Kept), threads = std::max<long>(1, pool.num_threads());
  const long most = 4096 / padded, least = 4 * line;
  long width = std::max(least, std::min(most, (p.outer + 2 * threads - 1) / (2 * threads)));
  width = (width + line - 1) / line * line;
  auto run = [&](auto of_rows, auto of_rounded) {
    share(pool, (p.outer + width - 1) / width, [&](long i) {
      (p.rounded ? of_rounded : of_rows)(p, i * width, std::min(width, p.outer - i * width));
    });
  };
  switch (padded) {
    case 1: return run(&by_rows<Kind, 1>, &by_rounded_rows<Kind, 1>);
    case 2: return run(&by_rows<Kind, 2>, &by_rounded_rows<Kind, 2>);
    case 4: return run(&by_rows<Kind, 4>, &by_rounded_rows<Kind, 4>);
    default: return run(&by_rows<Kind, 8>, &by_rounded_rows<Kind, 8>);
  }
}

// x (rows, inner); w one matrix or a stack of them, of which `layer` says which; scale and zero are empty, or like w with
// groups in the place of inner. `rounds`: x is rounded to 8 bits, with a step of its own for each row and group.
ffi::Error few_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> layer,
                    ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> zero, ffi::ResultBuffer<ffi::F32> y,
                    bool rounds) {
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
  std::vector<float> x_sums, steps;
  std::vector<int8_t> rounded;
  std::vector<int32_t> counts;
  if (scale.element_count() > 0) {
    p.groups = scale.dimensions()[scale.dimensions().size() - 2];
    p.scale = scale.typed_data() + index * p.groups * outer;
    if (zero.element_count() > 0) p.zero = zero.typed_data() + index * p.groups * outer;
    x_sums.assign(padded * p.groups, 0.0f);
    const long group = inner / p.groups;
    for (long b = 0; b < padded; ++b)
      for (long k = 0; k < inner; ++k) x_sums[b * p.groups + k / group] += own[b * inner + k];
    p.x_sums = x_sums.data();
    if (rounds) {
      if (group % 4) return ffi::Error::InvalidArgument("groups must be of a multiple of 4 inputs");
      rounded.resize(padded * inner), steps.resize(padded * p.groups), counts.resize(padded * p.groups);
      for (long at = 0; at < padded * p.groups; ++at) {
        const float* from = own.data() + at * group;
        float most = 0.0f;
        for (long k = 0; k < group; ++k) most = std::max(most, std::abs(from[k]));
        const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
        steps[at] = most / 127.0f;
        for (long k = 0; k < group; ++k) {
          rounded[at * group + k] = static_cast<int8_t>(std::lrint(from[k] * inverse));
          counts[at] += rounded[at * group + k];
        }
      }
      p.rounded = rounded.data(), p.steps = steps.data(), p.counts = counts.data();
    }
  }
  const long matrix = shape[shape.size() - 1] * shape[shape.size() - 2];
  const auto* bytes = static_cast<const uint8_t*>(w.untyped_data());
  switch (w.element_type()) {
    case ffi::F32: p.w = bytes + index * matrix * 4; multiply<Float32>(pool, p); break;
    case ffi::U16:
    case ffi::BF16: p.w = bytes + index * matrix * 2; multiply<BFloat16>(pool, p); break;
    case ffi::S8: p.w = bytes + index * matrix; multiply<Int8>(pool, p); break;
    case ffi::U8: p.w = bytes + index * matrix, p.shift = 8.0f; multiply<Int4>(pool, p); break;
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
                                  .Attr<bool>("rounds"));
