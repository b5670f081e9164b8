// The loop of every kernel: update.h over a span. The compiler vectorises it; `make vectorized` shows which loops.
//
// Flat forms (`Sweep::flat`): one pass; each element is decoded, updated and encoded in registers. Arrays of 16-bit
// elements are read and written in pairs.
//
// Block forms (`Blocks`): int8 states and split8 residuals, 64 elements at a time. A block passes through arrays on the
// stack that stay in the first cache: decode all operands, run the rule, find each state's new scale, encode. The scale
// of an int8 state is the largest magnitude of its block and is known only after the rule has run, so one pass over
// registers cannot do it. There are two versions of each block:
//   fast    for normal scales before and after the step, which is nearly always: no branches, one division per code
//   slow    for scales that are zero, tiny or not finite: care against underflow and NaN, in a function of its own
// The fast one finds out before it has written anything, and the block is then repeated by the slow one. Both give the
// same bits where both apply. A block at the end that is not full is padded with zeros in a copy (`last`).
#pragma once
#include "library.h"
#include "rules/update.h"

namespace fusedopt {
namespace {

// Two neighbours at once: 16-bit arrays are read and written as 32-bit words, since half of a loop over single elements
// would be widening and narrowing.
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

// The loop over blocks of kBlock elements, for forms with 8-bit operands.
template <class Rule, class W, class G, class S>
struct Blocks {
  using U = Update<Rule, W, G, S>;
  using P = typename W::Weight;
  using Residual = typename W::Residual;
  using Ready = typename U::Ready;
  static constexpr int N = U::N;
  static constexpr bool quantised = U::quantised;

  struct Operands {
    typename P::Stored* p;
    const typename G::Stored* g;
    Residual* residual;
    typename S::Stored* state[N + 1];
    float* scale[N + 1];

    FUSEDOPT_HD Operands at(int64_t i) const {
      Operands o;
      o.p = p + i;
      o.g = g + i;
      if constexpr (W::master != kNoMaster) o.residual = residual + i;
      for (int k = 0; k < N; ++k) {
        o.state[k] = state[k] + i;
        o.scale[k] = quantised ? scale[k] + i / kBlock : nullptr;
      }
      return o;
    }
  };

  static void sweep(const Ready& shared, const Span& span) {
    const Ready ready = shared;  // local copy: stores through uint8_t* may alias `shared`, which would force reloads
    Operands o;
    o.p = static_cast<typename P::Stored*>(span.param);
    o.g = static_cast<const typename G::Stored*>(span.grad);
    o.residual = static_cast<Residual*>(span.residual);
    for (int k = 0; k < N; ++k) {
      o.state[k] = static_cast<typename S::Stored*>(span.state[k]);
      o.scale[k] = span.scale[k];
    }
    const int64_t n = span.n, first = span.first;
    const uint32_t key = span.key;
    int64_t i = 0;
    for (; i + kBlock <= n; i += kBlock)
      if (!block<true>(ready, o.at(i), key, first + i)) slow(shared, o, span, i);
    if (i < n) last(shared, o, span, i);
  }

  // Updates a block that is not full in a copy padded with zeros.
  static FUSEDOPT_APART void last(const Ready& ready, const Operands& whole, const Span& span, int64_t i) {
    const Operands o = whole.at(i);
    const size_t n = size_t(span.n - i);
    typename P::Stored p[kBlock] = {};
    typename G::Stored g[kBlock] = {};
    Residual residual[kBlock] = {};
    typename S::Stored state[N + 1][kBlock] = {};
    Span copy = {p, g, {}, {}, residual, nullptr, kBlock, span.first + i, span.key};
    memcpy(p, o.p, n * sizeof p[0]);
    memcpy(g, o.g, n * sizeof g[0]);
    if constexpr (W::master != kNoMaster) memcpy(residual, o.residual, n * sizeof residual[0]);
    for (int k = 0; k < N; ++k) {
      memcpy(state[k], o.state[k], n * sizeof state[k][0]);
      copy.state[k] = state[k];
      copy.scale[k] = o.scale[k];
    }
    sweep(ready, copy);
    memcpy(o.p, p, n * sizeof p[0]);
    if constexpr (W::master != kNoMaster) memcpy(o.residual, residual, n * sizeof residual[0]);
    for (int k = 0; k < N; ++k) memcpy(o.state[k], state[k], n * sizeof state[k][0]);
  }

  static FUSEDOPT_APART void slow(const Ready& ready, const Operands& whole, const Span& span, int64_t i) {
    block<false>(ready, whole.at(i), span.key, span.first + i);
  }

  // The fast path, for normal scales. On any other scale it returns false and has written nothing.
  template <bool Fast>
  static FUSEDOPT_HD bool block(const Ready& ready, const Operands& o, uint32_t key, int64_t first) {
    float x[kBlock], y[kBlock], s[N + 1][kBlock], size[N + 1];
    uint32_t random[kBlock];
    auto* const p = o.p;  // local copies: stores through uint8_t* may alias `o`
    auto* const g = o.g;
    auto* const residual = o.residual;
    for (int k = 0; quantised && Fast && k < N; ++k)
      if (!normal_scale(*o.scale[k])) return false;
    for (int i = 0; i < kBlock; ++i) {
      typename W::ResidualWord r{};
      if constexpr (W::master != kNoMaster) r = typename W::ResidualWord(residual[i]);
      x[i] = W::load(p[i], r);
    }
    for (int i = 0; i < kBlock; ++i) y[i] = G::load(g[i]) * ready.scale;
    load<Fast>(o, s);
    FUSEDOPT_INDEPENDENT
    for (int i = 0; i < kBlock; ++i) {
      float t[N + 1];
      for (int k = 0; k < N; ++k) t[k] = s[k][i];
      apply<N>(ready.rule, x[i], y[i], t);
      for (int k = 0; k < N; ++k) s[k][i] = t[k];
    }
    if constexpr (quantised) {
      measure<Fast>(s, size);
      for (int k = 0; Fast && k < N; ++k)
        if (!normal_scale(size[k])) return false;
    }
    if (P::noisy || S::noisy) U::draw(key, first, random);
    FUSEDOPT_INDEPENDENT
    for (int i = 0; i < kBlock; ++i) {
      typename P::Word w;
      typename W::ResidualWord r{};
      W::store(x[i], w, r, P::noisy ? U::bits_of(random[i]) : 0);
      p[i] = typename P::Stored(w);
      if constexpr (W::master != kNoMaster) residual[i] = Residual(r);
    }
    float shift[kBlock];
    for (int i = 0; quantised && i < kBlock; ++i) shift[i] = U::shift_of(random[i]);
    store<Fast>(o, s, random, shift, size);
    return true;
  }

  // Decodes one state after the other: each has its own type of code.
  template <bool Fast, int K = 0>
  static FUSEDOPT_HD void load(const Operands& o, float (*s)[kBlock]) {
    if constexpr (K < N) {
      auto* const state = o.state[K];
      if constexpr (quantised) {
        const Decoder<typename U::template CodeOf<K>, Fast> decoder(*o.scale[K]);
        for (int i = 0; i < kBlock; ++i) s[K][i] = decoder(state[i]);
      } else {
        FUSEDOPT_INDEPENDENT
        for (int i = 0; i < kBlock; ++i) s[K][i] = S::load(state[i]);
      }
      load<Fast, K + 1>(o, s);
    }
  }
  // Each state's largest magnitude, compared as bits: no vector instruction has a maximum of floats that keeps NaN. A
  // negative second moment, which no rule produces, is no normal scale.
  template <bool Fast, int K = 0>
  static FUSEDOPT_HD void measure(const float (*s)[kBlock], float* size) {
    if constexpr (K < N) {
      uint32_t top = 0;
      for (int i = 0; i < kBlock; ++i) {
        const uint32_t b = Fast ? bits<uint32_t>(U::template CodeOf<K>::size(s[K][i])) : size_bits(s[K][i]);
        top = b > top ? b : top;
      }
      size[K] = bits<float>(top);
      measure<Fast, K + 1>(s, size);
    }
  }
  template <bool Fast, int K = 0>
  static FUSEDOPT_HD void store(const Operands& o, const float (*s)[kBlock], const uint32_t* random, const float* shift,
                                const float* size) {
    if constexpr (K < N) {
      auto* const state = o.state[K];
      if constexpr (quantised) {
        const Encoder<typename U::template CodeOf<K>, Fast> encoder(size[K]);
        *o.scale[K] = size[K];
        for (int i = 0; i < kBlock; ++i) state[i] = encoder(s[K][i], shift[i]);
      } else {
        FUSEDOPT_INDEPENDENT
        for (int i = 0; i < kBlock; ++i)
          state[i] = typename S::Stored(S::store(s[K][i], S::noisy ? U::bits_of(random[i]) : 0));
      }
      store<Fast, K + 1>(o, s, random, shift, size);
    }
  }
};

template <class Rule, class W, class G, class S>
struct Sweep : Update<Rule, W, G, S> {
  using U = Update<Rule, W, G, S>;
  using typename U::P;
  using typename U::Ready;
  using typename U::Residual;
  using typename U::T;
  using U::blocked, U::element, U::N, U::random;
  static constexpr bool paired =
      sizeof(typename P::Stored) == 2 || sizeof(typename G::Stored) == 2 || sizeof(typename S::Stored) == 2;

  static void prepare(const void*, const double* hyper, const Clock& clock, double scale, void* prepared) {
    U::prepare(hyper, clock, scale, prepared);
  }
  static void sweep(const void*, const void* prepared, const Span& span) {
    const Ready& ready = *static_cast<const Ready*>(prepared);
    if constexpr (blocked) {
      Blocks<Rule, W, G, S>::sweep(ready, span);
    } else {
      flat(Ready(ready), span);
    }
  }

  static void flat(const Ready& ready, const Span& span) {
    auto* p = static_cast<typename P::Stored*>(span.param);
    auto* g = static_cast<const typename G::Stored*>(span.grad);
    auto* residual = static_cast<Residual*>(span.residual);
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
        typename W::ResidualWord r[2];
        typename S::Word s[2][N + 1];
        get2(p, 2 * i, x[0], x[1]);
        get2(g, 2 * i, y[0], y[1]);
        get2(residual, 2 * i, r[0], r[1]);
        for (int k = 0; k < N; ++k) get2(state[k], 2 * i, s[0][k], s[1][k]);
        const uint32_t both = random ? noise(key, first + uint32_t(i)) : 0;
        element(ready, x[0], r[0], y[0], s[0], both & 0xffffu);
        element(ready, x[1], r[1], y[1], s[1], both >> 16);
        put2(p, 2 * i, x[0], x[1]);
        put2(residual, 2 * i, r[0], r[1]);
        for (int k = 0; k < N; ++k) put2(state[k], 2 * i, s[0][k], s[1][k]);
      }
      if (n % 2 == 0) return;
      const int64_t i = n - 1;
      typename P::Word x = p[i];
      typename W::ResidualWord r{};
      if constexpr (W::master != kNoMaster) r = typename W::ResidualWord(residual[i]);
      typename S::Word s[N + 1];
      for (int k = 0; k < N; ++k) s[k] = state[k][i];
      element(ready, x, r, typename G::Word(g[i]), s, random ? noise_at(key, span.first + i) : 0);
      p[i] = typename P::Stored(x);
      if constexpr (W::master != kNoMaster) residual[i] = Residual(r);
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
};

// What may follow the update, on a span that is still in the cache: proximal l1, then the weights' moving average.
template <class St>
void finish(const Finish& f, const Span& span) {
  using W = typename St::W;
  using P = typename St::P;
  using T = typename St::T;
  using Residual = typename St::Residual;
  auto* p = static_cast<typename P::Stored*>(span.param);
  auto* residual = static_cast<Residual*>(span.residual);
  const int64_t n = span.n;
  const uint32_t key = ~span.key;  // other random numbers than the update's
  if (f.shrink != 0) {
    const T shrink = T(f.shrink);
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      typename P::Word w = p[i];
      typename W::ResidualWord r{};
      if constexpr (W::master != kNoMaster) r = typename W::ResidualWord(residual[i]);
      St::threshold(shrink, w, r, P::noisy ? noise_at(key, span.first + i) : 0);
      p[i] = typename P::Stored(w);
      if constexpr (W::master != kNoMaster) residual[i] = Residual(r);
    }
  }
  if (span.ema) {
    auto* ema = static_cast<T*>(span.ema);
    const T weight = T(f.ema_weight);
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      typename W::ResidualWord r{};
      if constexpr (W::master != kNoMaster) r = typename W::ResidualWord(residual[i]);
      ema[i] = St::average(ema[i], typename P::Word(p[i]), r, weight);
    }
  }
}

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
