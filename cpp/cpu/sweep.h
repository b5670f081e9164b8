// The loop of every kernel: update.h over a span. The compiler vectorises it; `make vectorized` shows which loops.
//
// Flat forms (`Sweep::flat`): one pass; each element is decoded, updated and encoded in registers. Arrays of 16-bit
// elements are read and written in pairs.
//
// Block forms (`Blocks`): int8 states and split8 residuals, 64 elements at a time. A block passes through arrays on the
// stack that stay in the first cache: decode all operands, run the rule, find each state's new scale, encode. The scale
// of an int8 state is the largest magnitude of its block and is known only after the rule has run, so one pass over
// registers cannot do it. The loop assumes normal scales before and after the step: no branches, one division per code.
// A block with any other scale (zero, tiny or not finite) needs care against underflow and NaN. The loop finds out
// before it has written anything, and leaves the block to `update_carefully`, which all kernels share. Both give the
// same bits where both apply.
//
// A loop updates a multiple of `step` elements, a vector or more on every processor, so that the compiler generates
// vector code alone. What is left of a span passes through a copy padded with zeros (`update_rest`, shared as well).
#pragma once
#include "library.h"
#include "rules/update.h"

#ifndef FUSEDOPT_ISA
#error "FUSEDOPT_ISA: baseline, avx2 or avx512"
#endif

namespace fusedopt {

const HostForm* FUSEDOPT_CAT(forms_, FUSEDOPT_ISA)();

namespace {

// Updates as many elements of a span as are a multiple of the loop's step.
using Loop = void (*)(const void* prepared, const Span& span);

// Elements in the longest vector of numbers. Where a fused multiply-add is a call, no loop of a rule is vectorised.
#if defined(__AVX2__) || defined(__aarch64__) || defined(_M_ARM64)
constexpr int kVector = 16;
#else
constexpr int kVector = 1;
#endif

// What the functions that all kernels share need to know about one.
struct Shape {
  int param, grad, residual, state;  // bytes per element; residual: 0 if there is none
  int n_states, step, form;
  const Format* codes;
};
template <class U>
constexpr bool paired =
    sizeof(typename U::P::Stored) == 2 || sizeof(typename U::G::Stored) == 2 || sizeof(typename U::S::Stored) == 2;
template <class U>
constexpr Shape shape = {sizeof(typename U::P::Stored),
                         sizeof(typename U::G::Stored),
                         U::W::master == kNoMaster ? 0 : int(sizeof(typename U::Residual)),
                         sizeof(typename U::S::Stored),
                         U::N,
                         U::blocked ? kBlock : kVector * (paired<U> ? 2 : 1),
                         number_of(U::form),
                         U::R::codes};

inline char* moved(const void* x, int64_t elements, int size) {
  return static_cast<char*>(const_cast<void*>(x)) + elements * size;
}

// memcpy for few bytes, without a call.
inline void copy_short(char* to, const char* from, int64_t n) {
  constexpr int64_t kPiece = 16;
  if (n < kPiece) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i < n - kPiece; i += kPiece) memcpy(to + i, from + i, kPiece);
  memcpy(to + n - kPiece, from + n - kPiece, kPiece);
}

// Updates the elements from `from` on, fewer than a step.
inline FUSEDOPT_APART void update_rest(const Shape& shape, Loop loop, const void* prepared, const Span& span,
                                       int64_t from) {
  constexpr int kOperands = 3 + kMaxStates, kLine = 64;
  struct {
    char* original;
    int64_t bytes;
  } operands[kOperands];
  alignas(kLine) char memory[kOperands][kBlock * sizeof(double)];
  int n = 0;
  auto copied = [&](const void* x, int size) {
    operands[n] = {moved(x, from, size), (span.n - from) * size};
    for (int i = 0; i < shape.step * size; i += kLine) memset(memory[n] + i, 0, kLine);
    copy_short(memory[n], operands[n].original, operands[n].bytes);
    return static_cast<void*>(memory[n++]);
  };
  Span padded;
  padded.grad = copied(span.grad, shape.grad);
  padded.param = copied(span.param, shape.param);
  padded.residual = shape.residual ? copied(span.residual, shape.residual) : nullptr;
  for (int k = 0; k < shape.n_states; ++k) {
    padded.state[k] = copied(span.state[k], shape.state);
    padded.scale[k] = span.scale[k] ? span.scale[k] + from / kBlock : nullptr;
  }
  padded.n = shape.step;
  padded.first = span.first + from;
  padded.key = span.key;
  loop(prepared, padded);
  for (int i = 1; i < n; ++i) copy_short(operands[i].original, memory[i], operands[i].bytes);  // not the gradient
}

// Updates the block from `from` on, with any scales. `loop`: the rule's, in float32.
inline FUSEDOPT_APART void update_carefully(const Shape& shape, Loop loop, const void* prepared, const Span& span,
                                            int64_t from) {
  alignas(64) float numbers[2 + kMaxStates][kBlock];
  Span block = span, decoded = span;
  block.param = moved(span.param, from, shape.param);
  block.grad = moved(span.grad, from, shape.grad);
  block.residual = moved(span.residual, from, shape.residual);
  block.first += from;
  block.n = decoded.n = kBlock;
  decoded.param = numbers[0];
  decoded.grad = numbers[1];
  for (int k = 0; k < shape.n_states; ++k) {
    block.state[k] = moved(span.state[k], from, shape.state);
    block.scale[k] = span.scale[k] + from / kBlock;
    decoded.state[k] = numbers[2 + k];
  }
  const HostForm& form = FUSEDOPT_CAT(forms_, FUSEDOPT_ISA)()[shape.form];
  form.decode(block, shape.n_states, shape.codes, numbers[0], numbers[1], decoded.state);
  loop(prepared, decoded);
  form.encode(block, shape.n_states, shape.codes, numbers[0], decoded.state);
}

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

template <class Rule, class W, class G, class S>
struct Sweep;

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

  static FUSEDOPT_APART void sweep(const void* prepared, const Span& span) {
    // Local copy: stores through uint8_t* may alias `prepared`, which would force reloads.
    const Ready ready = *static_cast<const Ready*>(prepared);
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
    for (int64_t i = 0; i + kBlock <= n; i += kBlock)
      if (!block(ready, o.at(i), key, first + i))
        update_carefully(shape<U>, Sweep<Rule, Plain<F32>, F32, F32>::flat, prepared, span, i);
  }

  // Updates a block with normal scales. On any other scale it returns false and has written nothing.
  static FUSEDOPT_HD bool block(const Ready& ready, const Operands& o, uint32_t key, int64_t first) {
    float x[kBlock], y[kBlock], s[N + 1][kBlock], size[N + 1];
    uint32_t random[kBlock];
    auto* const p = o.p;  // local copies: stores through uint8_t* may alias `o`
    auto* const g = o.g;
    auto* const residual = o.residual;
    for (int k = 0; quantised && k < N; ++k)
      if (!normal_scale(*o.scale[k])) return false;
    for (int i = 0; i < kBlock; ++i) {
      typename W::ResidualWord r{};
      if constexpr (W::master != kNoMaster) r = typename W::ResidualWord(residual[i]);
      x[i] = W::load(p[i], r);
    }
    for (int i = 0; i < kBlock; ++i) y[i] = G::load(g[i]) * ready.scale;
    load(o, s);
    FUSEDOPT_INDEPENDENT
    for (int i = 0; i < kBlock; ++i) {
      float t[N + 1];
      for (int k = 0; k < N; ++k) t[k] = s[k][i];
      apply<N>(ready.rule, x[i], y[i], t);
      for (int k = 0; k < N; ++k) s[k][i] = t[k];
    }
    if constexpr (quantised) {
      measure(s, size);
      for (int k = 0; k < N; ++k)
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
    store(o, s, random, shift, size);
    return true;
  }

  // Decodes one state after the other: each has its own type of code.
  template <int K = 0>
  static FUSEDOPT_HD void load(const Operands& o, float (*s)[kBlock]) {
    if constexpr (K < N) {
      auto* const state = o.state[K];
      if constexpr (quantised) {
        const Decoder<typename U::template CodeOf<K>, true> decoder(*o.scale[K]);
        for (int i = 0; i < kBlock; ++i) s[K][i] = decoder(state[i]);
      } else {
        FUSEDOPT_INDEPENDENT
        for (int i = 0; i < kBlock; ++i) s[K][i] = S::load(state[i]);
      }
      load<K + 1>(o, s);
    }
  }
  // Each state's largest magnitude, compared as bits: no vector instruction has a maximum of floats that keeps NaN. A
  // negative second moment, which no rule produces, is no normal scale.
  template <int K = 0>
  static FUSEDOPT_HD void measure(const float (*s)[kBlock], float* size) {
    if constexpr (K < N) {
      uint32_t top = 0;
      for (int i = 0; i < kBlock; ++i) {
        const uint32_t b = bits<uint32_t>(U::template CodeOf<K>::size(s[K][i]));
        top = b > top ? b : top;
      }
      size[K] = bits<float>(top);
      measure<K + 1>(s, size);
    }
  }
  template <int K = 0>
  static FUSEDOPT_HD void store(const Operands& o, const float (*s)[kBlock], const uint32_t* random, const float* shift,
                                const float* size) {
    if constexpr (K < N) {
      auto* const state = o.state[K];
      if constexpr (quantised) {
        const Encoder<typename U::template CodeOf<K>, true> encoder(size[K]);
        *o.scale[K] = size[K];
        for (int i = 0; i < kBlock; ++i) state[i] = encoder(s[K][i], shift[i]);
      } else {
        FUSEDOPT_INDEPENDENT
        for (int i = 0; i < kBlock; ++i)
          state[i] = typename S::Stored(S::store(s[K][i], S::noisy ? U::bits_of(random[i]) : 0));
      }
      store<K + 1>(o, s, random, shift, size);
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
  static constexpr int step = shape<U>.step;

  static constexpr Loop loop() {
    if constexpr (blocked) {
      return Blocks<Rule, W, G, S>::sweep;
    } else {
      return flat;
    }
  }

  static void sweep(const void*, const void* prepared, const Span& span) {
    const int64_t whole = span.n / step * step;
    if (whole > 0) loop()(prepared, span);
    if (whole < span.n) update_rest(shape<U>, loop(), prepared, span, whole);
  }

  static FUSEDOPT_APART void flat(const void* prepared, const Span& span) {
    const Ready ready = *static_cast<const Ready*>(prepared);
    auto* p = static_cast<typename P::Stored*>(span.param);
    auto* g = static_cast<const typename G::Stored*>(span.grad);
    auto* residual = static_cast<Residual*>(span.residual);
    typename S::Stored* state[N + 1];
    for (int k = 0; k < N; ++k) state[k] = static_cast<typename S::Stored*>(span.state[k]);
    // A product with a constant tells the compiler that nothing is left.
    const int64_t n = span.n / step * step, pairs = span.n / step * (step / 2);
    const uint32_t key = span.key;
    if constexpr (paired<U>) {
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
