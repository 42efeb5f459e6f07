// What the kernels for CPUs share: vectors as wide as the machine's, and work divided over XLA's threads.

#ifndef CRAMJAX_NATIVE_H_
#define CRAMJAX_NATIVE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr long kLanes = 16;
#elif defined(__AVX__)
constexpr long kLanes = 8;
#else
constexpr long kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

#define INLINE inline __attribute__((always_inline))

template <class V, class T>
INLINE V loaded(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

INLINE void stored(float* to, Floats v) { std::memcpy(to, &v, sizeof(v)); }

INLINE float summed(Floats v) {
  typedef float Quarter __attribute__((vector_size(16)));
  Quarter parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof(v));
  for (long width = kLanes / 8; width > 0; width /= 2)
    for (long part = 0; part < width; ++part) parts[part] += parts[part + width];
  return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

INLINE float total(const float* from, long width) {
  Floats sum{};
  long n = 0;
  for (; n + kLanes <= width; n += kLanes) sum += loaded<Floats>(from + n);
  float rest = summed(sum);
  for (; n < width; ++n) rest += from[n];
  return rest;
}

// Runs parts 0 to count - 1, here and on the pool's threads. Nothing waits for a thread that has not begun.
void share(ffi::ThreadPool& pool, long count, const std::function<void(long)>& run) {
  const long threads = std::min<long>(count, pool.num_threads());
  if (threads < 2) {
    for (long i = 0; i < count; ++i) run(i);
    return;
  }
  struct Work {
    const std::function<void(long)>* run;
    long count;
    std::atomic<long> next{0}, done{0};
  };
  auto work = std::make_shared<Work>();
  work->run = &run;
  work->count = count;
  auto help = [work] {
    for (long i; (i = work->next.fetch_add(1)) < work->count;) {
      (*work->run)(i);
      work->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (long t = 1; t < threads; ++t) pool.Schedule(decltype(help)(help));
  help();
  for (int spins = 0; work->done.load(std::memory_order_acquire) < count; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

}  // namespace

#endif
