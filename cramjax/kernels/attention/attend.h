// Attention of a single query's heads to keys and values in pages, which are read where they are: a softmax in float32.

#ifndef CRAMJAX_ATTEND_H_
#define CRAMJAX_ATTEND_H_

#include <cmath>
#include <vector>

#include "native.h"

namespace {

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

// The sum of rows of `from`, which are `at` some places, times their weights; its parts are held in registers.
template <int kVectors>
INLINE long weigh_some(float* to, const float* from, const long* at, const float* weights, long count, long d,
                       long width) {
  for (; d + kVectors * kLanes <= width; d += kVectors * kLanes) {
    Floats sums[kVectors]{};
    for (long i = 0; i < count; ++i)
      for (int v = 0; v < kVectors; ++v) sums[v] += loaded<Floats>(from + at[i] + d + v * kLanes) * weights[i];
    for (int v = 0; v < kVectors; ++v) stored(to + d + v * kLanes, sums[v]);
  }
  return d;
}

INLINE void weigh(float* to, const float* from, const long* at, const float* weights, long count, long width) {
  long d = weigh_some<4>(to, from, at, weights, count, 0, width);
  d = weigh_some<1>(to, from, at, weights, count, d, width);
  for (; d < width; ++d)
    for (long i = 0; i < count; ++i) to[d] += from[at[i] + d] * weights[i];
}

// Keys and values (pages, places, kv_heads, width), and what each query sees of them: pages of a table (queries, held),
// in order, and so many of their keys.
struct Pages {
  float *keys, *values;
  long pages, places, kv_heads, width;
  const int32_t *table, *lengths;
  long held;

  long length(long query) const { return std::clamp<long>(lengths[query], 0, held * places); }

  // Where a position of a query's text is, plus `offset` pages.
  long at(long query, long position, long kv, long offset = 0) const {
    const long page = std::clamp<long>(table[query * held + position / places] + offset, 0, pages - 1);
    return ((page * places + position % places) * kv_heads + kv) * width;
  }
};

// How scores become weights.
struct Scores {
  float scale, softcap;  // 0: no cap
  long window;           // keys that are seen at most; 0: all
};

// What `group` query heads (group, width) of a key head give.
void attend(const Pages& p, const Scores& s, long query, long kv, long group, const float* q, float* result,
            long offset = 0) {
  const long length = p.length(query), begin = s.window > 0 ? std::max<long>(0, length - s.window) : 0;
  const long count = length - begin, room = (count + kLanes - 1) / kLanes * kLanes, width = p.width;
  std::fill_n(result, group * width, 0.0f);
  if (count == 0) return;
  std::vector<float> scores(group * room, -INFINITY);
  std::vector<long> at(count);
  for (long i = 0; i < count; ++i) at[i] = p.at(query, begin + i, kv, offset);
  for (long i = 0; i < count; ++i) {
    const float* key = p.keys + at[i];
    for (long g = 0; g < group; ++g) {
      const float score = s.scale * dot(q + g * width, key, width);
      scores[g * room + i] = s.softcap > 0 ? s.softcap * std::tanh(score / s.softcap) : score;
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
  for (long g = 0; g < group; ++g)
    weigh(result + g * width, p.values, at.data(), scores.data() + g * room, count, width);
}

}  // namespace

#endif
