// Products of a few rows with a ternary matrix that stays written in the dictionary's words (dictionary.py): y = x w.
//
// A column of the matrix is a stretch of words. A word is looked up once: 28 codes of 2 bits in 64, of which its length
// says how many count; those past it are code 0, whose weight is 0. So a word is a few whole vectors of weights, which
// meet the inputs from where the word before ended. Columns are shared between XLA's threads. Sums are float32.

#include <algorithm>
#include <cstdint>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "native.h"

namespace {

constexpr long kValues = 28;

// The weights of a word: vectors of kLanes, the last of which may reach past 28 with zeros.
constexpr int kVectors = (kValues + kLanes - 1) / kLanes;

#if defined(__AVX512F__)
struct Weights {
  __m512 levels;
  __m512i shifts;
  Weights(float first, float second) {
    float four[16] = {0.0f, first, second, 0.0f};
    levels = _mm512_loadu_ps(four);
    int steps[16];
    for (int i = 0; i < 16; ++i) steps[i] = 2 * i;
    shifts = _mm512_loadu_si512(steps);
  }
  INLINE void of(uint32_t low, uint32_t high, Floats* out) const {
    const __m512i three = _mm512_set1_epi32(3);
    // Past 12 values, the second number holds the length: its lanes are cleared.
    const __m512i a = _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(low), shifts), three);
    const __m512i b = _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(high & 0xFFFFFF), shifts), three);
    out[0] = (Floats)_mm512_permutexvar_ps(a, levels);
    out[1] = (Floats)_mm512_permutexvar_ps(b, levels);
  }
};
#elif defined(__AVX2__)
struct Weights {
  __m256 levels;
  __m256i shifts, later;
  Weights(float first, float second) {
    levels = _mm256_setr_ps(0.0f, first, second, 0.0f, 0.0f, first, second, 0.0f);
    shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    later = _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30);
  }
  INLINE void of(uint32_t low, uint32_t high, Floats* out) const {
    // The selection reads two bits of each lane, so what is above them does not matter.
    const __m256i a = _mm256_set1_epi32(low), b = _mm256_set1_epi32(high & 0xFFFFFF);
    out[0] = (Floats)_mm256_permutevar_ps(levels, _mm256_srlv_epi32(a, shifts));
    out[1] = (Floats)_mm256_permutevar_ps(levels, _mm256_srlv_epi32(a, later));
    out[2] = (Floats)_mm256_permutevar_ps(levels, _mm256_srlv_epi32(b, shifts));
    out[3] = (Floats)_mm256_permutevar_ps(levels, _mm256_srlv_epi32(b, later));
  }
};
#else
struct Weights {
  float levels[4];
  Weights(float first, float second) : levels{0.0f, first, second, 0.0f} {}
  INLINE void of(uint32_t low, uint32_t high, Floats* out) const {
    uint64_t codes = low | static_cast<uint64_t>(high & 0xFFFFFF) << 32;
    for (int v = 0; v < kVectors; ++v)
      for (int lane = 0; lane < kLanes; ++lane, codes >>= 2) out[v][lane] = levels[codes & 3];
  }
};
#endif

struct Problem {
  const uint16_t* words;
  const int32_t* starts;  // (outer + 1,)
  const uint16_t* levels;  // bfloat16 (2, outer)
  const uint32_t* table;   // (65536, 2)
  const float* x;          // (B, stride), with zeros past the inputs
  long stride, outer, most;
  float* y;  // (B, outer)
};

INLINE float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

template <int B>
void columns(const Problem& p, long begin, long end) {
  for (long n = begin; n < end; ++n) {
    const Weights weights(widened(p.levels[n]), widened(p.levels[p.outer + n]));
    Floats sums[B][kVectors] = {};
    const long last = std::min<long>(p.starts[n + 1], p.most);
    const float* x = p.x;
    for (long word = std::max<long>(p.starts[n], 0); word < last; ++word) {
      const uint32_t* entry = p.table + 2 * p.words[word];
      Floats own[kVectors];
      weights.of(entry[0], entry[1], own);
      for (int b = 0; b < B; ++b)
        for (int v = 0; v < kVectors; ++v) sums[b][v] += own[v] * loaded<Floats>(x + b * p.stride + v * kLanes);
      x += 2 * (entry[1] >> 28);
      if (x > p.x + p.stride - kVectors * kLanes) break;  // the words are not this matrix's
    }
    for (int b = 0; b < B; ++b) {
      Floats sum = sums[b][0];
      for (int v = 1; v < kVectors; ++v) sum += sums[b][v];
      p.y[b * p.outer + n] = summed(sum);
    }
  }
}

// x (rows, inner); words (matrices, words), starts (matrices, outer + 1), levels (matrices, 2, outer): `which` is meant.
ffi::Error coded_product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U16> words,
                         ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::BF16> levels, ffi::Buffer<ffi::U32> table,
                         ffi::Buffer<ffi::S32> which, ffi::ResultBuffer<ffi::F32> y) {
  const long rows = x.dimensions()[0], inner = x.dimensions()[1], outer = y->dimensions()[1];
  const long most = words.dimensions()[1], matrices = words.dimensions()[0];
  if (rows < 1 || rows > 8) return ffi::Error::InvalidArgument("rows must be 1 to 8");
  const long index = std::clamp<long>(*which.typed_data(), 0, matrices - 1);
  Problem p{};
  p.words = words.typed_data() + index * most, p.most = most;
  p.starts = starts.typed_data() + index * (outer + 1);
  p.levels = reinterpret_cast<const uint16_t*>(levels.untyped_data()) + index * 2 * outer;
  p.table = table.typed_data(), p.outer = outer;
  // A word may begin at the last input, and reads whole vectors.
  p.stride = inner + 1 + kVectors * kLanes;
  std::vector<float> own(8 * p.stride, 0.0f), padded(8 * outer);
  for (long b = 0; b < rows; ++b) std::copy_n(x.typed_data() + b * inner, inner, own.data() + b * p.stride);
  p.x = own.data(), p.y = padded.data();
  const long threads = std::max<long>(1, pool.num_threads());
  const long width = std::max<long>(16, (outer + 4 * threads - 1) / (4 * threads));
  auto run = [&](auto of) {
    share(pool, (outer + width - 1) / width, [&](long i) { of(p, i * width, std::min(outer, (i + 1) * width)); });
  };
  if (rows == 1) run(&columns<1>);
  else if (rows == 2) run(&columns<2>);
  else if (rows <= 4) run(&columns<4>);
  else run(&columns<8>);
  std::copy_n(padded.data(), rows * outer, y->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cramjax_coded_product, coded_product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
