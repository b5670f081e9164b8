// What happens to ONE element in one combination of formats: load, rule, store, and what follows the update where it is
// asked for (l1, the weights' moving average). The CPU's loop (sweep.h) and CUDA's (grid.h) are built on it, so no rule
// and no rounding is stated twice. Options that belong to every rule live here.
#pragma once
#include "library.h"

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

// The random bits of element i: half of a number that two neighbours share.
FUSEDOPT_HD uint32_t noise_at(uint32_t key, int64_t i) {
  const uint32_t both = noise(key, uint32_t(i >> 1));
  return (i & 1) ? both >> 16 : both & 0xffffu;
}

template <class Rule, class W_, class G_, class S_>
struct Update {
  using R = Rule;
  using W = W_;
  using G = G_;
  using S = S_;
  using P = typename W::Weight;
  using T = typename P::Number;
  using Rest = typename W::Rest;
  using Ready = Prepared<Rule, T>;
  using Wide = typename P::Wide;                        // the format of T itself
  using Alone = Update<Rule, Plain<Wide>, Wide, Wide>;  // with the same constants
  static constexpr int N = words(Rule::states);
  template <int K>
  using CodeOf = typename Code<code_of(word(Rule::states, K))>::type;
  static_assert(N <= 3, "give Apply one more case");
  static_assert(N <= kMaxStates, "raise kMaxStates");
  static_assert(words(Rule::hyper) <= kMaxHyper, "raise kMaxHyper");
  static_assert(sizeof(typename Rule::Hyper) == sizeof(double) * words(Rule::hyper), "Hyper and its names differ");
  static_assert(sizeof(Ready) <= kPreparedBytes && alignof(Ready) <= 16, "raise kPreparedBytes");

  static constexpr bool quantised = S::format == kI8;
  static constexpr bool blocked = quantised || W::master == kSplit8;
  static constexpr bool random = P::noisy || S::noisy;
  static constexpr bool counts = blocked || random;
  static constexpr bool exists = N == 0 ? !S::noisy : !quantised || quantisable(Rule::states);
  static constexpr Form form = {P::format, G::format, S::format, W::master, P::noisy, S::noisy};

  // Computes the constants of a step; g is multiplied by `scale`.
  static FUSEDOPT_HD void prepare(const double* hyper, const Clock& clock, double scale, void* prepared) {
    typename Rule::Hyper h;
    memcpy(&h, hyper, sizeof h);
    const Ready ready{Rule(h, clock), T(scale)};
    memcpy(prepared, &ready, sizeof ready);
  }

  static FUSEDOPT_HD void advance(const double* hyper, Clock& clock) {
    typename Rule::Hyper h;
    memcpy(&h, hyper, sizeof h);
    const double f = Rule::factor(h, ++clock.t);
    clock.carry = clock.single ? double(float(clock.carry) * float(f)) : clock.carry * f;
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

  // Proximal l1: towards zero by `shrink`, and no further.
  static FUSEDOPT_HD void threshold(T shrink, typename P::Word& w, typename W::RestWord& rest, uint32_t bits16) {
    const T x = W::load(w, rest), size = magnitude(x) - shrink;
    const T less = x < T(0) ? -size : size;
    W::store(size > T(0) ? less : x != x ? x : T(0), w, rest, bits16);
  }

  static FUSEDOPT_HD T average(T ema, typename P::Word w, typename W::RestWord rest, T weight) {
    return lerp(ema, T(W::load(w, rest)), weight);
  }

  // The random bits that elements of a block get, in numbers of `parts` each: 16 bits, or 8 where there are only codes
  // to round. Number i of a block serves its elements i, i + numbers, i + 2 numbers, ...; each finds its own at the
  // top.
  static constexpr int bits_each = P::noisy || !quantised ? 16 : 8, parts = 32 / bits_each, numbers = kBlock / parts;
  static FUSEDOPT_HD uint32_t block_noise(uint32_t key, int64_t block, int i) {
    return noise(key, uint32_t(block) * numbers + uint32_t(i));
  }
  static FUSEDOPT_HD uint32_t part_of(uint32_t number, int k) { return number << (32 - bits_each * (k + 1)); }
  static FUSEDOPT_HD uint32_t bits_of(uint32_t part) { return part >> 16; }
  // For a code: of 16 bits the lower 8, since the upper ones decide on the weight.
  static FUSEDOPT_HD float shift_of(uint32_t part) { return code_shift(bits_each == 16 ? part << 8 : part); }
};

}  // namespace
}  // namespace fusedopt
