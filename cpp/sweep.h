// THE loop: load, rule, store, over a span. Options that belong to every rule live here (so far: the gradient's
// multiplier, which unscales, clips and signs in a register). The compiler vectorises it; `make vectorized` shows
// where.
#pragma once
#include "table.h"

#if defined(__clang__)
#define FUSEDOPT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FUSEDOPT_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define FUSEDOPT_INDEPENDENT __pragma(loop(ivdep))
#else
#define FUSEDOPT_INDEPENDENT
#endif

#if defined(__GNUC__)
#define FUSEDOPT_APART __attribute__((noinline))
#else
#define FUSEDOPT_APART
#endif

namespace fusedopt {
namespace {

template <class Rule, class Number>
struct Prepared {
  Rule rule;
  Number scale;
};

constexpr int words(const char* s) {
  int n = 0;
  for (bool in = false; *s; ++s) {
    if (*s != ' ' && !in) ++n;
    in = *s != ' ';
  }
  return n;
}

// A rule's update takes p, g and one reference for each state: unpacked by index.
template <int N>
struct Apply;
template <>
struct Apply<0> {
  template <class R, class T>
  static FUSEDOPT_HD void to(const R& r, T& p, T g, T*) {
    r(p, g);
  }
};
template <>
struct Apply<1> {
  template <class R, class T>
  static FUSEDOPT_HD void to(const R& r, T& p, T g, T* s) {
    r(p, g, s[0]);
  }
};
template <>
struct Apply<2> {
  template <class R, class T>
  static FUSEDOPT_HD void to(const R& r, T& p, T g, T* s) {
    r(p, g, s[0], s[1]);
  }
};
template <>
struct Apply<3> {
  template <class R, class T>
  static FUSEDOPT_HD void to(const R& r, T& p, T g, T* s) {
    r(p, g, s[0], s[1], s[2]);
  }
};

// Two neighbours at once, so that 16-bit arrays are read and written by 32-bit words: half of a loop over them would
// otherwise be spent on widening and narrowing.
template <class Word, class Stored>
FUSEDOPT_HD void get2(const Stored* x, int64_t i, Word& a, Word& b) {
  if constexpr (sizeof(Stored) == 2 && kLittleEndian) {
    uint32_t w;
    memcpy(&w, x + i, sizeof w);
    a = Word(w & 0xffffu);
    b = Word(w >> 16);
  } else {
    a = Word(x[i]);
    b = Word(x[i + 1]);
  }
}
template <class Word, class Stored>
FUSEDOPT_HD void put2(Stored* x, int64_t i, Word a, Word b) {
  if constexpr (sizeof(Stored) == 2 && kLittleEndian) {
    const uint32_t w = (uint32_t(a) & 0xffffu) | uint32_t(b) << 16;
    memcpy(x + i, &w, sizeof w);
  } else {
    x[i] = Stored(a);
    x[i + 1] = Stored(b);
  }
}
FUSEDOPT_HD void get2(const Nothing*, int64_t, Nothing&, Nothing&) {}
FUSEDOPT_HD void put2(Nothing*, int64_t, Nothing, Nothing) {}

// The random bits of element i: half of a number that two neighbours share.
FUSEDOPT_HD uint32_t noise_at(uint32_t key, int64_t i) {
  const uint32_t both = noise(key, uint32_t(i >> 1));
  return (i & 1) ? both >> 16 : both & 0xffffu;
}

// The loop over whole blocks, for formats that have no 16-bit or 32-bit words: everything is decoded into numbers, the
// rule runs over these, and they are encoded.
template <class Rule, class W, class G, class S>
struct Blocks {
  using P = typename W::Weight;
  using Rest = typename W::Rest;
  using Ready = Prepared<Rule, float>;
  static constexpr int N = words(Rule::states);
  static constexpr bool quantised = S::format == kI8;

  struct Operands {
    typename P::Stored* p;
    const typename G::Stored* g;
    Rest* rest;
    typename S::Stored* state[N + 1];
    float* scale[N + 1];
  };

  static void sweep(const Ready& ready, const Span& span) {
    Operands o;
    o.p = static_cast<typename P::Stored*>(span.param);
    o.g = static_cast<const typename G::Stored*>(span.grad);
    o.rest = static_cast<Rest*>(span.rest);
    for (int k = 0; k < N; ++k) {
      o.state[k] = static_cast<typename S::Stored*>(span.state[k]);
      o.scale[k] = span.scale[k];
    }
    int64_t i = 0;
    for (; i + kBlock <= span.n; i += kBlock) {
      block(ready, o, span.key, span.first + i);
      o.p += kBlock;
      o.g += kBlock;
      if constexpr (W::master != kNoMaster) o.rest += kBlock;
      for (int k = 0; k < N; ++k) {
        o.state[k] += kBlock;
        if (quantised) ++o.scale[k];
      }
    }
    if (i < span.n) last(ready, o, span.key, span.first + i, size_t(span.n - i));
  }

  // A block that is not full is worked on in a copy; what is beyond it is zero.
  static FUSEDOPT_APART void last(const Ready& ready, const Operands& o, uint32_t key, int64_t first, size_t n) {
    typename P::Stored p[kBlock] = {};
    typename G::Stored g[kBlock] = {};
    Rest rest[kBlock] = {};
    typename S::Stored state[N + 1][kBlock] = {};
    Span copy = {p, g, {}, {}, rest, nullptr, kBlock, first, key};
    memcpy(p, o.p, n * sizeof p[0]);
    memcpy(g, o.g, n * sizeof g[0]);
    if constexpr (W::master != kNoMaster) memcpy(rest, o.rest, n * sizeof rest[0]);
    for (int k = 0; k < N; ++k) {
      memcpy(state[k], o.state[k], n * sizeof state[k][0]);
      copy.state[k] = state[k];
      copy.scale[k] = o.scale[k];
    }
    sweep(ready, copy);
    memcpy(o.p, p, n * sizeof p[0]);
    if constexpr (W::master != kNoMaster) memcpy(o.rest, rest, n * sizeof rest[0]);
    for (int k = 0; k < N; ++k) memcpy(o.state[k], state[k], n * sizeof state[k][0]);
  }

  static FUSEDOPT_HD void block(const Ready& ready, const Operands& o, uint32_t key, int64_t first) {
    float x[kBlock], y[kBlock], s[N + 1][kBlock];
    int32_t random[kBlock];
    auto* const p = o.p;  // as locals: bytes may be anything, o included, as far as the compiler knows
    auto* const g = o.g;
    auto* const rest = o.rest;
    if (P::noisy || S::noisy) draw(key, first, random);
    for (int i = 0; i < kBlock; ++i) {
      typename W::RestWord r{};
      if constexpr (W::master != kNoMaster) r = typename W::RestWord(rest[i]);
      x[i] = W::load(p[i], r);
    }
    for (int i = 0; i < kBlock; ++i) y[i] = G::load(g[i]) * ready.scale;
    load(o, s);
    FUSEDOPT_INDEPENDENT
    for (int i = 0; i < kBlock; ++i) {
      float t[N + 1];
      for (int k = 0; k < N; ++k) t[k] = s[k][i];
      Apply<N>::to(ready.rule, x[i], y[i], t);
      for (int k = 0; k < N; ++k) s[k][i] = t[k];
    }
    FUSEDOPT_INDEPENDENT
    for (int i = 0; i < kBlock; ++i) {
      typename P::Word w;
      typename W::RestWord r{};
      W::store(x[i], w, r, P::noisy ? uint32_t(random[i]) : 0);
      p[i] = typename P::Stored(w);
      if constexpr (W::master != kNoMaster) rest[i] = Rest(r);
    }
    float part[kBlock];  // of a code's step
    for (int i = 0; quantised && i < kBlock; ++i) part[i] = float(random[i] & 255) * 0x1p-8f;
    store(o, s, random, part);
  }

  // Random bits for each element of a block: 16, or 8 where there are only codes to round; parts of a number.
  static FUSEDOPT_HD void draw(uint32_t key, int64_t first, int32_t* random) {
    constexpr int bits_each = P::noisy || !quantised ? 16 : 8, parts = 32 / bits_each, n = kBlock / parts;
    const uint32_t start = uint32_t(first / kBlock) * n;
    for (int i = 0; i < n; ++i) {
      const uint32_t all = noise(key, start + uint32_t(i));
      for (int k = 0; k < parts; ++k) random[i + k * n] = int32_t((all >> (k * bits_each)) & ((1u << bits_each) - 1));
    }
  }

  // The states, one after the other: each has a code of its own.
  template <int K = 0>
  static FUSEDOPT_HD void load(const Operands& o, float (*s)[kBlock]) {
    if constexpr (K < N) {
      constexpr Format code = code_of(word(Rule::states, K));
      auto* const state = o.state[K];
      if constexpr (!quantised) {
        FUSEDOPT_INDEPENDENT
        for (int i = 0; i < kBlock; ++i) s[K][i] = S::load(state[i]);
      } else {
        decode<typename Code<code>::type>(state, *o.scale[K], s[K]);
      }
      load<K + 1>(o, s);
    }
  }
  template <int K = 0>
  static FUSEDOPT_HD void store(const Operands& o, const float (*s)[kBlock], const int32_t* random, const float* part) {
    if constexpr (K < N) {
      constexpr Format code = code_of(word(Rule::states, K));
      auto* const state = o.state[K];
      if constexpr (!quantised) {
        FUSEDOPT_INDEPENDENT
        for (int i = 0; i < kBlock; ++i)
          state[i] = typename S::Stored(S::store(s[K][i], S::noisy ? uint32_t(random[i]) : 0));
      } else {
        encode<typename Code<code>::type>(s[K], part, state, o.scale[K]);
      }
      store<K + 1>(o, s, random, part);
    }
  }

  template <class C>
  static FUSEDOPT_HD void decode(const uint8_t* code, float scale, float* x) {
    if (scale < kTiny) return decode_tiny<C>(code, scale, x);
    const float unit = scale * (1.0f / (C::top * C::top));
    for (int i = 0; i < kBlock; ++i) x[i] = C::decode(code[i]) * unit;
  }
  template <class C>
  static FUSEDOPT_HD void encode(const float* x, const float* part, uint8_t* code, float* scale) {
    int32_t top = 0;  // of the bits: magnitudes are in their order, NaN on top; of floats no vector has a maximum
    for (int i = 0; i < kBlock; ++i) {
      const int32_t b = bits<int32_t>(x[i]) & 0x7fffffff;
      top = b > top ? b : top;
    }
    const float size = bits<float>(top);
    *scale = size;
    if (size < kTiny) return encode_tiny<C>(x, part, code, size);
    const float inverse = C::top * C::top / size;
    for (int i = 0; i < kBlock; ++i) code[i] = uint8_t(C::encode(magnitude(x[i]) * inverse, x[i], part[i], 1.0f));
  }

  // Blocks so small that the fast way would run out of float32: zero, denormal and a little above.
  static constexpr float kTiny = 0x1p-96f;
  template <class C>
  static FUSEDOPT_APART void decode_tiny(const uint8_t* code, float scale, float* x) {
    for (int i = 0; i < kBlock; ++i) x[i] = C::decode(code[i]) * (1.0f / (C::top * C::top)) * scale;
  }
  template <class C>
  static FUSEDOPT_APART void encode_tiny(const float* x, const float* part, uint8_t* code, float size) {
    const float inverse = size > 0.0f ? C::top * C::top / (size * 0x1p64f) : 0.0f;
    const float least = size > 0.0f ? 1.0f : 0.0f;
    for (int i = 0; i < kBlock; ++i)
      code[i] = uint8_t(C::encode(magnitude(x[i]) * 0x1p64f * inverse, x[i], part[i], least));
  }
};

template <class Rule, class W, class G, class S>
struct Sweep {
  using P = typename W::Weight;
  using T = typename P::Number;
  using Rest = typename W::Rest;
  using Ready = Prepared<Rule, T>;
  static constexpr int N = words(Rule::states);
  static_assert(N <= 3 && N <= kMaxStates, "give Apply one more case");
  static_assert(sizeof(Ready) <= kPreparedBytes && alignof(Ready) <= 16, "raise kPreparedBytes");

  static constexpr bool quantised = S::format == kI8;
  static constexpr bool blocked = quantised || W::master == kSplit8;
  static constexpr bool random = P::noisy || S::noisy;
  static constexpr bool counts = blocked || random;
  static constexpr bool paired =
      sizeof(typename P::Stored) == 2 || sizeof(typename G::Stored) == 2 || sizeof(typename S::Stored) == 2;
  static constexpr bool exists = N == 0 ? !S::noisy : !quantised || quantisable(Rule::states);
  static constexpr Form form = {P::format, G::format, S::format, W::master, P::noisy, S::noisy};

  static void prepare(const double* hyper, const Clock& clock, double scale, void* prepared) {
    typename Rule::Hyper h;
    static_assert(sizeof h == sizeof(double) * words(Rule::hyper), "Hyper and its names differ");
    memcpy(&h, hyper, sizeof h);
    const Ready ready{Rule(h, clock), T(scale)};
    memcpy(prepared, &ready, sizeof ready);
  }

  static void advance(const double* hyper, Clock& clock) {
    typename Rule::Hyper h;
    memcpy(&h, hyper, sizeof h);
    const double f = Rule::factor(h, ++clock.t);
    clock.carry = clock.single ? double(float(clock.carry) * float(f)) : clock.carry * f;
  }

  static void sweep(const void* prepared, const Span& span) {
    const Ready ready = *static_cast<const Ready*>(prepared);
    if constexpr (blocked) {
      Blocks<Rule, W, G, S>::sweep(ready, span);
    } else {
      flat(ready, span);
    }
  }

  static void flat(const Ready& ready, const Span& span) {
    auto* p = static_cast<typename P::Stored*>(span.param);
    auto* g = static_cast<const typename G::Stored*>(span.grad);
    auto* rest = static_cast<Rest*>(span.rest);
    typename S::Stored* state[N + 1];
    for (int k = 0; k < N; ++k) state[k] = static_cast<typename S::Stored*>(span.state[k]);
    const int64_t n = span.n;
    const uint32_t key = span.key;
    if constexpr (paired) {
      const int64_t pairs = n / 2;
      const uint32_t first = uint32_t(span.first >> 1);
      FUSEDOPT_INDEPENDENT
      for (int64_t i = 0; i < pairs; ++i) {
        typename P::Word x[2];
        typename G::Word y[2];
        typename W::RestWord r[2];
        typename S::Word s[2][N + 1];
        get2(p, 2 * i, x[0], x[1]);
        get2(g, 2 * i, y[0], y[1]);
        get2(rest, 2 * i, r[0], r[1]);
        for (int k = 0; k < N; ++k) get2(state[k], 2 * i, s[0][k], s[1][k]);
        const uint32_t both = random ? noise(key, first + uint32_t(i)) : 0;
        element(ready, x[0], r[0], y[0], s[0], both & 0xffffu);
        element(ready, x[1], r[1], y[1], s[1], both >> 16);
        put2(p, 2 * i, x[0], x[1]);
        put2(rest, 2 * i, r[0], r[1]);
        for (int k = 0; k < N; ++k) put2(state[k], 2 * i, s[0][k], s[1][k]);
      }
      if (n % 2 == 0) return;
      const int64_t i = n - 1;
      typename P::Word x = p[i];
      typename W::RestWord r{};
      if constexpr (W::master != kNoMaster) r = typename W::RestWord(rest[i]);
      typename S::Word s[N + 1];
      for (int k = 0; k < N; ++k) s[k] = state[k][i];
      element(ready, x, r, typename G::Word(g[i]), s, random ? noise_at(key, span.first + i) : 0);
      p[i] = typename P::Stored(x);
      if constexpr (W::master != kNoMaster) rest[i] = Rest(r);
      for (int k = 0; k < N; ++k) state[k][i] = typename S::Stored(s[k]);
    } else {
      FUSEDOPT_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        typename P::Word x = p[i];
        Nothing none;
        typename S::Word s[N + 1];
        for (int k = 0; k < N; ++k) s[k] = state[k][i];
        element(ready, x, none, g[i], s, 0);
        p[i] = x;
        for (int k = 0; k < N; ++k) state[k][i] = s[k];
      }
    }
  }

  static FUSEDOPT_HD void element(const Ready& ready, typename P::Word& w, typename W::RestWord& rest,
                                  typename G::Word g, typename S::Word* state, uint32_t bits16) {
    T x = T(W::load(w, rest));
    T s[N + 1];
    for (int k = 0; k < N; ++k) s[k] = T(S::load(state[k]));
    Apply<N>::to(ready.rule, x, T(G::load(g)) * ready.scale, s);
    W::store(x, w, rest, bits16);
    for (int k = 0; k < N; ++k) state[k] = S::store(s[k], bits16);
  }

  // On a span that is still in the cache: proximal l1, then the moving average of the weights.
  static void finish(const Finish& f, const Span& span) {
    auto* p = static_cast<typename P::Stored*>(span.param);
    auto* rest = static_cast<Rest*>(span.rest);
    const int64_t n = span.n;
    const uint32_t key = ~span.key;  // the numbers of the update have been used
    if (f.shrink != 0) {
      const T shrink = T(f.shrink);
      FUSEDOPT_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        typename P::Word w = p[i];
        typename W::RestWord r{};
        if constexpr (W::master != kNoMaster) r = typename W::RestWord(rest[i]);
        const T x = W::load(w, r), size = magnitude(x) - shrink;
        const T less = x < T(0) ? -size : size;
        W::store(size > T(0) ? less : x != x ? x : T(0), w, r, P::noisy ? noise_at(key, span.first + i) : 0);
        p[i] = typename P::Stored(w);
        if constexpr (W::master != kNoMaster) rest[i] = Rest(r);
      }
    }
    if (span.ema) {
      auto* ema = static_cast<T*>(span.ema);
      const T weight = T(f.ema_weight);
      FUSEDOPT_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        typename W::RestWord r{};
        if constexpr (W::master != kNoMaster) r = typename W::RestWord(rest[i]);
        ema[i] = lerp(ema[i], T(W::load(p[i], r)), weight);
      }
    }
  }
};

// Sum of squares in double, over lanes that are the same on every instruction set, then a fixed tree over the lanes.
template <class F>
double square_sum(const void* data, int64_t n) {
  constexpr int kLanes = 16;
  auto* x = static_cast<const typename F::Stored*>(data);
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) {
      double v = double(F::load(x[i + k]));
      lane[k] += v * v;
    }
  for (int k = 0; i < n; ++i, ++k) {
    double v = double(F::load(x[i]));
    lane[k] += v * v;
  }
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) lane[k] += lane[k + width];
  return lane[0];
}

}  // namespace
}  // namespace fusedopt
