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

template <class Rule, class P, class G, class S>
struct Sweep {
  using T = typename P::Number;
  using Ready = Prepared<Rule, T>;
  static constexpr int N = words(Rule::states);
  static_assert(N <= 3 && N <= kMaxStates, "give Apply one more case");
  static_assert(sizeof(Ready) <= kPreparedBytes && alignof(Ready) <= 16, "raise kPreparedBytes");

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
    auto* p = static_cast<typename P::Stored*>(span.param);
    auto* g = static_cast<const typename G::Stored*>(span.grad);
    typename S::Stored* state[N + 1];
    for (int k = 0; k < N; ++k) state[k] = static_cast<typename S::Stored*>(span.state[k]);
    const int64_t n = span.n;
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      T x = T(P::load(p[i]));
      T s[N + 1];
      for (int k = 0; k < N; ++k) s[k] = T(S::load(state[k][i]));
      Apply<N>::to(ready.rule, x, T(G::load(g[i])) * ready.scale, s);
      p[i] = P::store(x);
      for (int k = 0; k < N; ++k) state[k][i] = S::store(s[k]);
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
