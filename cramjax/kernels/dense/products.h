// Products of up to eight rows with columns of a matrix that is read from memory once, in the form it is kept in.
//
// A matrix (inner, outer) lies in memory row after row. Sums are float32. What is compiled here is compiled on the
// machine that runs it (cramjax/kernels/native.py), so that its vectors are as wide as that one's.

#ifndef CRAMJAX_PRODUCTS_H_
#define CRAMJAX_PRODUCTS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "native.h"

namespace {

constexpr long kMostRows = 8;

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

// A kind of weight: rows of the matrix that one row in memory holds, and these as floats, a vector or one at a time.
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

// Adds to `rows` sums of `width` columns what R rows in memory give; x is (inner, B).
template <class Kind, int B, int R>
INLINE void add(const typename Kind::Kept* w, long stride, const float* x, float* sums, long width) {
  constexpr int kRows = R * Kind::kRows;
  constexpr long kAhead = 16 / Kind::kRows;
  long n = 0;
  for (; n + 2 * kLanes <= width; n += 2 * kLanes) {
    Floats left[kRows], right[kRows];
    for (int r = 0; r < R; ++r) {
      const auto* at = w + r * stride + n;
      __builtin_prefetch(at + kAhead * stride);
      Kind::vectors(at, left + r * Kind::kRows);
      Kind::vectors(at + kLanes, right + r * Kind::kRows);
    }
    for (int b = 0; b < B; ++b) {
      float* sum = sums + b * width + n;
      Floats s = loaded<Floats>(sum), t = loaded<Floats>(sum + kLanes);
      for (int r = 0; r < kRows; ++r) {
        s += left[r] * x[r * B + b];
        t += right[r] * x[r * B + b];
      }
      stored(sum, s);
      stored(sum + kLanes, t);
    }
  }
  for (; n < width; ++n) {
    float column[kRows];
    for (int r = 0; r < R; ++r) Kind::scalars(w + r * stride + n, column + r * Kind::kRows);
    for (int b = 0; b < B; ++b)
      for (int r = 0; r < kRows; ++r) sums[b * width + n] += column[r] * x[r * B + b];
  }
}

// The same of `count` rows in memory, their sums held in registers: a weight is widened once for as many rows of x as
// there are registers for.
template <class Kind, int B>
INLINE void add_tiles(const typename Kind::Kept* w, long stride, long count, const float* x, float* sums, long width) {
  constexpr int kHeld = kLanes == 16 ? 8 : 4, kTogether = B < kHeld ? B : kHeld;
  constexpr long kTile = 2 * kLanes, kAhead = 2 * kTile;
  long n = 0;
  for (; n + kTile <= width; n += kTile) {
    const auto* ahead = n + kAhead < width ? w + n + kAhead : w + count * stride + (n + kAhead - width);
    for (int first = 0; first < B; first += kTogether) {
      Floats s[kTogether], t[kTogether];
      for (int b = 0; b < kTogether; ++b) s[b] = t[b] = Floats{};
      for (long k = 0; k < count; ++k) {
        Floats left[Kind::kRows], right[Kind::kRows];
        __builtin_prefetch(ahead + k * stride);
        Kind::vectors(w + k * stride + n, left);
        Kind::vectors(w + k * stride + n + kLanes, right);
        for (int r = 0; r < Kind::kRows; ++r) {
          const float* factors = x + (k * Kind::kRows + r) * B + first;
#pragma GCC unroll 8
          for (int b = 0; b < kTogether; ++b) {
            s[b] += left[r] * factors[b];
            t[b] += right[r] * factors[b];
          }
        }
      }
      for (int b = 0; b < kTogether; ++b) {
        float* sum = sums + (first + b) * width + n;
        stored(sum, loaded<Floats>(sum) + s[b]);
        stored(sum + kLanes, loaded<Floats>(sum + kLanes) + t[b]);
      }
    }
  }
  for (; n < width; ++n)
    for (long k = 0; k < count; ++k) {
      float column[Kind::kRows];
      Kind::scalars(w + k * stride + n, column);
      for (int r = 0; r < Kind::kRows; ++r)
        for (int b = 0; b < B; ++b) sums[b * width + n] += column[r] * x[(k * Kind::kRows + r) * B + b];
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

// One matrix (inner, outer).
struct Matrix {
  ffi::DataType kind;
  const void* w;
  const float* scale;  // (groups, outer); null: none
  const float* zero;   // like scale; null: 0
  long inner, outer, groups;
};

// One to eight rows as products read them.
struct Inputs {
  long rows, padded, inner, groups;  // rows are padded with zeros to 1, 2, 4 or 8
  std::vector<float> x;              // (inner, padded)
  std::vector<float> sums;           // (padded, groups): of each group's inputs, where there are scales
  std::vector<int8_t> rounded;       // (padded, inner): x over `steps`, rounded to 8 bits; empty: it is not
  std::vector<float> steps;          // (padded, groups)
  std::vector<int32_t> counts;       // (padded, groups): of each group's rounded inputs

  // from (rows, inner), `stride` numbers apart. `rounds`: with a step of its own for each row and group.
  void read(const float* from, long stride, long count, const Matrix& m, bool rounds) {
    rows = count, inner = m.inner, groups = m.groups;
    padded = rows <= 2 ? rows : rows <= 4 ? 4 : kMostRows;
    if (padded == 1) {
      x.assign(from, from + inner);
    } else {
      x.assign(padded * inner, 0.0f);
      for (long b = 0; b < rows; ++b)
        for (long k = 0; k < inner; ++k) x[k * padded + b] = from[b * stride + k];
    }
    rounded.clear();
    if (!m.scale) return;
    const long group = inner / groups;
    sums.assign(padded * groups, 0.0f);
    for (long b = 0; b < rows; ++b)
      for (long g = 0; g < groups; ++g) sums[b * groups + g] = total(from + b * stride + g * group, group);
    if (!rounds) return;
    rounded.assign(padded * inner, 0), steps.assign(padded * groups, 0.0f), counts.assign(padded * groups, 0);
    for (long b = 0; b < rows; ++b)
      for (long g = 0; g < groups; ++g) {
        const float* own = from + b * stride + g * group;
        float most = 0.0f;
        for (long k = 0; k < group; ++k) most = std::max(most, std::abs(own[k]));
        const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
        // max() drops what is no number: the sum keeps it, and so does the step, and the product.
        steps[b * groups + g] = most / 127.0f + 0.0f * sums[b * groups + g];
        for (long k = 0; k < group; ++k) {
          const auto code = static_cast<int8_t>(std::lrint(own[k] * inverse));
          rounded[b * inner + g * group + k] = code;
          counts[b * groups + g] += code;
        }
      }
  }
};

// Columns from `begin` on, for (rows, width) results that are `stride` numbers apart.
template <class Kind, int B>
void by_rows(const Matrix& m, const Inputs& in, long begin, long width, float* y, long stride) {
  constexpr int R = 4;
  // Codes are kept plus 8 where they are pairs; without scales, a block of rows stays in the first cache.
  constexpr float kShift = Kind::kRows == 2 ? 8.0f : 0.0f;
  constexpr long kBlockRows = 64;
  std::vector<float> total(B * width, 0.0f), part(m.scale ? B * width : 0);
  const auto* w = static_cast<const typename Kind::Kept*>(m.w) + begin;
  const long group = m.scale ? m.inner / m.groups : kBlockRows * Kind::kRows;
  for (long from = 0, g = 0; from < m.inner; from += group, ++g) {
    float* sums = total.data();
    if (m.scale) {
      std::fill(part.begin(), part.end(), 0.0f);
      sums = part.data();
    }
    const long last = std::min(from + group, m.inner) / Kind::kRows;
    long k = from / Kind::kRows;
    if constexpr (B > 2) {
      add_tiles<Kind, B>(w + k * m.outer, m.outer, last - k, in.x.data() + from * B, sums, width);
    } else {
      for (; k + R <= last; k += R)
        add<Kind, B, R>(w + k * m.outer, m.outer, in.x.data() + k * Kind::kRows * B, sums, width);
      for (; k < last; ++k)
        add<Kind, B, 1>(w + k * m.outer, m.outer, in.x.data() + k * Kind::kRows * B, sums, width);
    }
    if (!m.scale) continue;
    const float* scale = m.scale + g * m.outer + begin;
    const float* zero = m.zero ? m.zero + g * m.outer + begin : nullptr;
    for (int b = 0; b < B; ++b) {
      const float x_sum = in.sums[b * m.groups + g], shifted = kShift * x_sum;
      float *to = total.data() + b * width, *own = part.data() + b * width;
      if (zero)
        for (long n = 0; n < width; ++n) to[n] += scale[n] * (own[n] - shifted - zero[n] * x_sum);
      else
        for (long n = 0; n < width; ++n) to[n] += scale[n] * (own[n] - shifted);
    }
  }
  for (long b = 0; b < in.rows; ++b) std::copy_n(total.data() + b * width, width, y + b * stride);
}

// The same of codes, and of inputs that are rounded too: sums of a group are whole numbers.
template <class Kind, int B>
void by_rounded_rows(const Matrix& m, const Inputs& in, long begin, long width, float* y, long stride) {
  if constexpr (sizeof(typename Kind::Kept) == 1) {
    constexpr int Q = 2, kOffset = Kind::kRows == 2 ? 8 : 128;
    std::vector<float> total(B * width, 0.0f);
    std::vector<int32_t> sums(B * width);
    const auto* w = static_cast<const typename Kind::Kept*>(m.w) + begin;
    const int8_t* x = in.rounded.data();
    const long group = m.inner / m.groups;
    for (long g = 0; g < m.groups; ++g) {
      for (long b = 0; b < B; ++b)
        std::fill_n(sums.data() + b * width, width, -kOffset * in.counts[b * m.groups + g]);
      const long last = (g + 1) * group;
      long k = g * group;
      for (; k + 4 * Q <= last; k += 4 * Q)
        add_rounded<Kind, B, Q>(w + k / Kind::kRows * m.outer, m.outer, x + k, m.inner, sums.data(), width);
      for (; k < last; k += 4)
        add_rounded<Kind, B, 1>(w + k / Kind::kRows * m.outer, m.outer, x + k, m.inner, sums.data(), width);
      const float* scale = m.scale + g * m.outer + begin;
      const float* zero = m.zero ? m.zero + g * m.outer + begin : nullptr;
      for (int b = 0; b < B; ++b) {
        const float step = in.steps[b * m.groups + g], count = in.counts[b * m.groups + g];
        float* to = total.data() + b * width;
        int32_t* from = sums.data() + b * width;
        ordered(from, width);
        if (zero)
          for (long n = 0; n < width; ++n) to[n] += scale[n] * step * (from[n] - zero[n] * count);
        else
          for (long n = 0; n < width; ++n) to[n] += scale[n] * (step * from[n]);
      }
    }
    for (long b = 0; b < in.rows; ++b) std::copy_n(total.data() + b * width, width, y + b * stride);
  }
}

template <class Kind>
INLINE void columns_of(const Matrix& m, const Inputs& in, long begin, long width, float* y, long stride) {
  auto run = [&](auto exactly, auto rounded) {
    (in.rounded.empty() ? exactly : rounded)(m, in, begin, width, y, stride);
  };
  switch (in.padded) {
    case 1: return run(&by_rows<Kind, 1>, &by_rounded_rows<Kind, 1>);
    case 2: return run(&by_rows<Kind, 2>, &by_rounded_rows<Kind, 2>);
    case 4: return run(&by_rows<Kind, 4>, &by_rounded_rows<Kind, 4>);
    default: return run(&by_rows<Kind, 8>, &by_rounded_rows<Kind, 8>);
  }
}

// What `width` columns from `begin` on give: (rows, width), `stride` numbers apart.
void columns(const Matrix& m, const Inputs& in, long begin, long width, float* y, long stride) {
  switch (m.kind) {
    case ffi::F32: return columns_of<Float32>(m, in, begin, width, y, stride);
    case ffi::S8: return columns_of<Int8>(m, in, begin, width, y, stride);
    case ffi::U8: return columns_of<Int4>(m, in, begin, width, y, stride);
    default: return columns_of<BFloat16>(m, in, begin, width, y, stride);
  }
}

// Of a weight; 0: there is no such kind.
INLINE long bits_of(ffi::DataType kind) {
  switch (kind) {
    case ffi::F32: return 32;
    case ffi::BF16:
    case ffi::U16: return 16;
    case ffi::S8: return 8;
    case ffi::U8: return 4;
    default: return 0;
  }
}

// Columns that one thread is given at once: whole vectors, of which sums stay in the first cache; two such parts for
// each thread, if another number of them is not more even.
long columns_at_once(const Matrix& m, long padded, long threads) {
  constexpr long kUnit = 2 * kLanes;
  const long units = (m.outer + kUnit - 1) / kUnit, most = 4096 / padded / kUnit;
  long best = units, least = units;
  for (long parts : {2, 1, 3, 4}) {
    const long own = std::min(most, (units + parts * threads - 1) / (parts * threads));
    const long slowest = ((units + own - 1) / own + threads - 1) / threads * own;
    if (slowest < least || best > most) best = own, least = slowest;
  }
  return best * kUnit;
}

// Matrix number `layer` of a stack, or the only one; scale and zero are empty, or have groups in the place of inner.
Matrix matrix_of(const ffi::AnyBuffer& w, const ffi::Buffer<ffi::F32>& scale, const ffi::Buffer<ffi::F32>& zero,
                 long layer) {
  const auto shape = w.dimensions();
  const long kept = shape[shape.size() - 2], outer = shape[shape.size() - 1];
  const long index = shape.size() == 3 ? std::clamp<long>(layer, 0, shape[0] - 1) : 0;
  Matrix m{w.element_type(), nullptr, nullptr, nullptr, kept, outer, 1};
  if (m.kind == ffi::U8) m.inner *= 2;
  m.w = static_cast<const uint8_t*>(w.untyped_data()) + index * (m.inner * outer * bits_of(m.kind) / 8);
  if (scale.element_count() > 0) {
    m.groups = scale.dimensions()[scale.dimensions().size() - 2];
    m.scale = scale.typed_data() + index * m.groups * outer;
    if (zero.element_count() > 0) m.zero = zero.typed_data() + index * m.groups * outer;
  }
  return m;
}

}  // namespace

#endif
