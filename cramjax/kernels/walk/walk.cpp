// All blocks of a stack for up to eight new tokens, in one call: norm, projection, attention, projection, norm and
// feed-forward layer, layer after layer. Threads meet after each product, which costs a microsecond, and not in a
// program between them, which costs tens.

#include "attention/attend.h"
#include "dense/products.h"

namespace {

constexpr long kAlone = 1 << 17;  // bytes of a layer's weights that no thread is woken for

// Phases that follow each other, of parts that whoever is there takes. Nothing waits for a thread that has not begun:
// one that comes late finds nothing left of those that are done.
struct Team {
  struct alignas(64) Phase {
    std::atomic<long> next{0}, done{0};
  };
  std::vector<Phase> phases;
  explicit Team(long count) : phases(count) {}
};

struct Member {
  Team& team;
  long at = 0;

  // Parts 0 to count - 1 of the next phase. `prepare` is called before the first part that falls to this thread.
  template <class Prepare, class Run>
  INLINE void phase(long count, Prepare prepare, Run run) {
    Team::Phase& own = team.phases[at++];
    long i = own.next.fetch_add(1);
    if (i < count) {
      prepare();
      do {
        run(i);
        own.done.fetch_add(1, std::memory_order_release);
      } while ((i = own.next.fetch_add(1)) < count);
    }
    for (int spins = 0; own.done.load(std::memory_order_acquire) < count; ++spins) {
      if (spins > 4000) std::this_thread::yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }
};

using FloatsOf = ffi::Buffer<ffi::F32>;

const float* or_null(const FloatsOf& buffer) { return buffer.element_count() ? buffer.typed_data() : nullptr; }

// One matrix of each layer, and how its columns are shared out.
struct Stacked {
  ffi::AnyBuffer w;
  FloatsOf scale, zero, bias;
  bool rounds;
  long outer, width, parts;  // columns; those of a part; parts

  Stacked(ffi::AnyBuffer w, FloatsOf scale, FloatsOf zero, FloatsOf bias, bool rounds)
      : w(w), scale(scale), zero(zero), bias(bias), rounds(rounds) {}

  Matrix of(long layer) const { return matrix_of(w, scale, zero, layer); }

  void divide(long columns, long rows, long threads) {
    Matrix m = of(0);
    m.outer = outer = columns;
    width = columns_at_once(m, rows, threads);
    parts = (outer + width - 1) / width;
  }

  // Asks for the first rows of a layer's matrix: they come while the inputs are made ready.
  void ask(long layer) const {
    const Matrix m = of(layer);
    const auto* first = static_cast<const uint8_t*>(m.w);
    const long bytes = std::min<long>(m.outer * bits_of(m.kind), 1 << 15);
    for (long n = 0; n < bytes; n += 64) __builtin_prefetch(first + n, 0, 2);
  }

  // (rows, count) columns from `begin` on, with their bias.
  void columns_of(long layer, const Inputs& in, long begin, long count, float* y, long stride) const {
    const Matrix m = of(layer);
    columns(m, in, begin, count, y, stride);
    if (const float* own = or_null(bias))
      for (long b = 0; b < in.rows; ++b)
        for (long n = 0; n < count; ++n) y[b * stride + n] += own[layer * m.outer + begin + n];
  }
};

struct Norm {
  const float *weight, *bias;
};

enum Activation : int64_t { kGelu = 0, kGeluTanh = 1, kSilu = 2, kRelu2 = 3 };

INLINE Floats logistic(Floats x) {
  const Floats e = exponential(x < 0.0f ? x : Floats{} - x);
  return (x < 0.0f ? e : Floats{} + 1.0f) / (1.0f + e);
}

INLINE Floats activated(Activation kind, Floats x) {
  switch (kind) {
    case kGeluTanh: return x * logistic(1.5957691216f * x * (1.0f + 0.044715f * x * x));
    case kSilu: return x * logistic(x);
    case kRelu2: return x < 0.0f ? Floats{} : x * x;
    default:
      for (long i = 0; i < kLanes; ++i) x[i] *= 0.5f + 0.5f * std::erf(x[i] * 0.70710678f);
      return x;
  }
}

struct Walk {
  long rows, width, layers, heads, kv_heads, head, mlp;
  bool gated, centred;
  bool apart;  // several tokens are of one text: all are held before any is seen
  Activation activation;
  float eps, head_eps;  // head_eps < 0: heads are not normalised
  Stacked qkv, out, up, down;
  Norm first, second;
  const float *query_norm, *key_norm, *cosines, *sines;
  Pages pages;
  Scores scores;
  float* x;                           // (rows, width)
  std::vector<float> made, mixed, hidden;  // (rows, …): queries, keys and values; heads' results; between up and down
  long layer_pages;

  // The rows as a norm gives them.
  void normed(const Norm& norm, long layer, std::vector<float>& to) const {
    to.resize(rows * width);
    for (long b = 0; b < rows; ++b) {
      const float* from = x + b * width;
      float* own = to.data() + b * width;
      float mean = 0.0f;
      for (long n = 0; centred && n < width; ++n) mean += from[n];
      mean /= width;
      for (long n = 0; n < width; ++n) own[n] = from[n] - mean;
      const float scale = 1.0f / std::sqrt(dot(own, own, width) / width + eps);
      for (long n = 0; n < width; ++n) own[n] *= scale;
      if (norm.weight)
        for (long n = 0; n < width; ++n) own[n] *= norm.weight[layer * width + n];
      if (norm.bias)
        for (long n = 0; n < width; ++n) own[n] += norm.bias[layer * width + n];
    }
  }

  // A head of a row, normalised and turned.
  void turned(long row, const float* from, const float* weight, long layer, float* to) const {
    std::copy_n(from, head, to);
    if (head_eps >= 0.0f) {
      const float scale = 1.0f / std::sqrt(dot(to, to, head) / head + head_eps);
      for (long d = 0; d < head; ++d) to[d] *= weight ? scale * weight[layer * head + d] : scale;
    }
    if (!cosines) return;
    const long half = head / 2;
    const float *c = cosines + row * half, *s = sines + row * half;
    for (long d = 0; d < half; ++d) {
      const float a = to[d], b = to[d + half];
      to[d] = a * c[d] - b * s[d];
      to[d + half] = b * c[d] + a * s[d];
    }
  }

  // The key and the value of a row's head take their place.
  void hold(long row, long kv, long layer) {
    const long length = pages.length(row);
    if (length == 0) return;
    const long to = pages.at(row, length - 1, kv, layer * layer_pages);
    const float* key = made.data() + row * qkv.outer + (heads + kv) * head;
    turned(row, key, key_norm, layer, pages.keys + to);
    std::copy_n(key + kv_heads * head, head, pages.values + to);
  }

  void attend_to(long row, long kv, long layer, std::vector<float>& queries) {
    const long group = heads / kv_heads, first = kv * group * head;
    queries.resize(group * head);
    for (long g = 0; g < group; ++g)
      turned(row, made.data() + row * qkv.outer + first + g * head, query_norm, layer, queries.data() + g * head);
    float* to = mixed.data() + row * heads * head + first;
    attend(pages, scores, row, kv, group, queries.data(), to, layer * layer_pages);
  }

  // Columns of a projection back to the stream, added to it.
  void added(const Stacked& w, long layer, const Inputs& in, long part, std::vector<float>& own) {
    const long begin = part * w.width, count = std::min(w.width, w.outer - begin);
    own.resize(rows * count);
    w.columns_of(layer, in, begin, count, own.data(), count);
    for (long b = 0; b < rows; ++b)
      for (long n = 0; n < count; ++n) x[b * width + begin + n] += own[b * count + n];
  }

  void fed_forward(long layer, const Inputs& in, long part, std::vector<float>& own) {
    const long begin = part * up.width, count = std::min(up.width, mlp - begin);
    const long room = (count + kLanes - 1) / kLanes * kLanes;
    own.assign(2 * rows * room, 0.0f);
    float *gate = own.data(), *value = own.data() + rows * room;
    up.columns_of(layer, in, begin, count, gate, room);
    if (gated) up.columns_of(layer, in, mlp + begin, count, value, room);
    for (long at = 0; at < rows * room; at += kLanes) {
      const Floats made = activated(activation, loaded<Floats>(gate + at));
      stored(gate + at, gated ? made * loaded<Floats>(value + at) : made);
    }
    for (long b = 0; b < rows; ++b) std::copy_n(gate + b * room, count, hidden.data() + b * mlp + begin);
  }

  void run(Member me) {
    Inputs in;
    std::vector<float> own;
    for (long layer = 0; layer < layers; ++layer) {
      me.phase(
          qkv.parts,
          [&] {
            qkv.ask(layer);
            normed(first, layer, own);
            in.read(own.data(), width, rows, qkv.of(layer), qkv.rounds);
          },
          [&](long i) {
            const long begin = i * qkv.width, count = std::min(qkv.width, qkv.outer - begin);
            qkv.columns_of(layer, in, begin, count, made.data() + begin, qkv.outer);
          });
      auto nothing = [] {};
      if (apart) me.phase(rows * kv_heads, nothing, [&](long i) { hold(i / kv_heads, i % kv_heads, layer); });
      me.phase(rows * kv_heads, nothing, [&](long i) {
        if (!apart) hold(i / kv_heads, i % kv_heads, layer);
        attend_to(i / kv_heads, i % kv_heads, layer, own);
      });
      me.phase(
          out.parts, [&] { out.ask(layer), in.read(mixed.data(), heads * head, rows, out.of(layer), out.rounds); },
          [&](long i) { added(out, layer, in, i, own); });
      me.phase(
          up.parts,
          [&] {
            up.ask(layer);
            normed(second, layer, own);
            in.read(own.data(), width, rows, up.of(layer), up.rounds);
          },
          [&](long i) { fed_forward(layer, in, i, own); });
      me.phase(
          down.parts, [&] { down.ask(layer), in.read(hidden.data(), mlp, rows, down.of(layer), down.rounds); },
          [&](long i) { added(down, layer, in, i, own); });
    }
  }
};

// x (tokens, width); cosines and sines (tokens, head / 2) or empty; keys and values (layers, pages, places, kv_heads,
// head), which are results too, the same memory; table (tokens, n); lengths (tokens,), each token counted; then of the
// stack, empty where there is none: norms' weights and biases, heads' norms, and of qkv, out, up and down the matrix,
// scale, zero and bias.
ffi::Error walk(ffi::ThreadPool pool, FloatsOf x, FloatsOf cosines, FloatsOf sines, FloatsOf keys, FloatsOf values,
                ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> lengths, ffi::RemainingArgs weights,
                ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::F32> new_keys,
                ffi::ResultBuffer<ffi::F32> new_values, int64_t heads, int64_t activation, bool gated, bool centred,
                bool apart, float eps, float head_eps, int64_t rounds, float scale, float softcap, int64_t window) {
  auto floats = [&](int i) { return *weights.get<FloatsOf>(i); };
  auto stacked = [&](int i) {
    const int at = 6 + 4 * i;
    return Stacked(*weights.get<ffi::AnyBuffer>(at), floats(at + 1), floats(at + 2), floats(at + 3), rounds >> i & 1);
  };
  const auto shape = keys.dimensions();
  const long rows = x.dimensions()[0], width = x.dimensions()[1];
  const long layers = shape[0], kv_heads = shape[3], head = shape[4];
  if (rows < 1 || rows > kMostRows) return ffi::Error::InvalidArgument("tokens must be 1 to 8");
  auto own = std::make_shared<Walk>(Walk{
      rows, width, layers, heads, kv_heads, head, 0, gated, centred, apart, static_cast<Activation>(activation), eps,
      head_eps, stacked(0), stacked(1), stacked(2), stacked(3),
      {or_null(floats(0)), or_null(floats(1))},
      {or_null(floats(2)), or_null(floats(3))}, or_null(floats(4)), or_null(floats(5)), or_null(cosines),
      or_null(sines),
      Pages{new_keys->typed_data(), new_values->typed_data(), layers * shape[1], shape[2], kv_heads, head,
            table.typed_data(), lengths.typed_data(), table.dimensions()[1]},
      Scores{scale, softcap, static_cast<long>(window)}, y->typed_data(), {}, {}, {}, shape[1]});
  std::copy_n(x.typed_data(), rows * width, own->x);
  const long threads = std::max<long>(1, pool.num_threads()), padded = rows <= 2 ? rows : rows <= 4 ? 4 : kMostRows;
  own->mlp = own->down.of(0).inner;
  own->qkv.divide((heads + 2 * kv_heads) * head, padded, threads);
  own->out.divide(width, padded, threads);
  own->up.divide(own->mlp, padded, threads);
  own->down.divide(width, padded, threads);
  own->made.resize(rows * own->qkv.outer);
  own->mixed.resize(rows * heads * head);
  own->hidden.resize(rows * own->mlp);
  auto team = std::make_shared<Team>(6 * layers);
  const long bytes = own->up.w.size_bytes() / layers;
  const long most = std::max({own->qkv.parts, own->up.parts, rows * kv_heads});
  const long useful = bytes < kAlone ? 1 : std::min(threads, most);
  for (long t = 1; t < useful; ++t) pool.Schedule([own, team] { own->run(Member{*team}); });
  own->run(Member{*team});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cramjax_walk, walk,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<FloatsOf>()
                                  .Arg<FloatsOf>()
                                  .Arg<FloatsOf>()
                                  .Arg<FloatsOf>()
                                  .Arg<FloatsOf>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<FloatsOf>()
                                  .Ret<FloatsOf>()
                                  .Ret<FloatsOf>()
                                  .Attr<int64_t>("heads")
                                  .Attr<int64_t>("activation")
                                  .Attr<bool>("gated")
                                  .Attr<bool>("centred")
                                  .Attr<bool>("apart")
                                  .Attr<float>("eps")
                                  .Attr<float>("head_eps")
                                  .Attr<int64_t>("rounds")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"));
