// The update of ONE element in one form: load, rule, store, and the options of every rule that follow it (l1, the
// weights' moving average). Both loops, the CPU's (sweep.h) and the device's (grid.h), use it.
#pragma once
#include "rules/formats.h"
#include "rules/rules.h"

namespace fusedopt {
namespace {

// A rule with the constants of a step, and the factor of every gradient.
template <class Rule, class Number>
struct Prepared {
  Rule rule;
  Number scale;
};

// Calls a rule's update with p, g and a reference to each state.
template <class Rule, class T, size_t... k>
FUSEDOPT_HD void apply_unpacked(const Rule& rule, T& p, T g, T* s, Indices<k...>) {
  rule(p, g, s[k]...);
}
template <int N, class Rule, class T>
FUSEDOPT_HD void apply(const Rule& rule, T& p, T g, T* s) {
  apply_unpacked(rule, p, g, s, typename IndicesTo<N>::type());
}

// The random bits of element i: half of a random number that two neighbours share.
FUSEDOPT_HD uint32_t noise_at(uint32_t key, int64_t i) {
  const uint32_t both = noise(key, uint32_t(i >> 1));
  return (i & 1) ? both >> 16 : both & 0xffffu;
}

// How the operands of one form are stored, whatever the rule.
template <class W_, class G_, class S_>
struct Storage {
  using W = W_;
  using G = G_;
  using S = S_;
  using P = typename W::Weight;
  using T = typename P::Number;
  using Residual = typename W::Residual;
  static constexpr bool quantised = S::format == kI8;
  static constexpr bool blocked = quantised || W::master == kSplit8;
  static constexpr bool random = P::noisy || S::noisy;
  static constexpr Form form = {P::format, G::format, S::format, W::master, P::noisy, S::noisy};

  // Proximal l1 (soft threshold): towards zero by `shrink`, not beyond zero.
  static FUSEDOPT_HD void threshold(T shrink, typename P::Word& w, typename W::ResidualWord& residual,
                                    uint32_t bits16) {
    const T x = W::load(w, residual), size = magnitude(x) - shrink;
    const T less = x < T(0) ? -size : size;
    W::store(size > T(0) ? less : x != x ? x : T(0), w, residual, bits16);
  }

  static FUSEDOPT_HD T average(T ema, typename P::Word w, typename W::ResidualWord residual, T weight) {
    return lerp(ema, T(W::load(w, residual)), weight);
  }

  // The random bits of the elements of a block, 16 for each, or 8 where only codes are rounded. One random number
  // serves `parts` elements: number i the elements i, i + numbers, i + 2 numbers, ... Each element shifts its share of
  // the number into the top bits.
  static constexpr int bits_each = P::noisy || !quantised ? 16 : 8, parts = 32 / bits_each, numbers = kBlock / parts;
  static FUSEDOPT_HD uint32_t block_noise(uint32_t key, int64_t block, int i) {
    return noise(key, uint32_t(block) * numbers + uint32_t(i));
  }
  static FUSEDOPT_HD uint32_t part_of(uint32_t number, int k) { return number << (32 - bits_each * (k + 1)); }
  static FUSEDOPT_HD void draw(uint32_t key, int64_t first, uint32_t* drawn) {
    for (int i = 0; i < numbers; ++i) {
      const uint32_t number = block_noise(key, first / kBlock, i);
      for (int k = 0; k < parts; ++k) drawn[i + k * numbers] = part_of(number, k);
    }
  }
  static FUSEDOPT_HD uint32_t bits_of(uint32_t part) { return part >> 16; }
  // For a code: the lower 8 of the 16 bits, since the upper ones decide how the weight is rounded.
  static FUSEDOPT_HD float shift_of(uint32_t part) { return code_shift(bits_each == 16 ? part << 8 : part); }
};

template <class Rule, class W_, class G_, class S_>
struct Update : Storage<W_, G_, S_> {
  using Base = Storage<W_, G_, S_>;
  using R = Rule;
  using typename Base::G;
  using typename Base::P;
  using typename Base::S;
  using typename Base::T;
  using typename Base::W;
  using Ready = Prepared<Rule, T>;
  using Wide = typename P::Wide;                        // the format of T itself
  using Alone = Update<Rule, Plain<Wide>, Wide, Wide>;  // with the same constants
  static constexpr int N = words(Rule::states);
  template <int K>
  using CodeOf = typename Code<Rule::codes[K]>::type;
  static_assert(N <= kMaxStates, "raise kMaxStates");
  static_assert(words(Rule::hyper) <= kMaxHyper, "raise kMaxHyper");
  static_assert(N == 0 || sizeof(Rule::codes) == sizeof(Format) * (N ? N : 1), "name a code for each state");
  static_assert(sizeof(typename Rule::Hyper) == sizeof(double) * words(Rule::hyper), "Hyper and its names differ");
  static_assert(sizeof(Ready) <= kPreparedBytes && alignof(Ready) <= 16, "raise kPreparedBytes");
  static constexpr bool exists = N == 0 ? !S::noisy : !Base::quantised || quantisable(Rule::codes, N);

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

  static FUSEDOPT_HD void element(const Ready& ready, typename P::Word& w, typename W::ResidualWord& residual,
                                  typename G::Word g, typename S::Word* state, uint32_t bits16) {
    T x = T(W::load(w, residual));
    T s[N + 1];
    for (int k = 0; k < N; ++k) s[k] = T(S::load(state[k]));
    apply<N>(ready.rule, x, T(G::load(g)) * ready.scale, s);
    W::store(x, w, residual, bits16);
    for (int k = 0; k < N; ++k) state[k] = S::store(s[k], bits16);
  }
};

template <class R>
void advance(const void*, const double* hyper, Clock& clock) {
  Update<R, Plain<F64>, F64, F64>::advance(hyper, clock);
}

template <class R>
constexpr Rule describe(const char* name) {
  Rule rule{name, R::hyper, R::states, {}, words(R::states), R::carries, nullptr, advance<R>};
  static_assert(sizeof(R::codes) > 0, "");  // has clang 14 instantiate the array
  for (int k = 0; k < rule.n_states; ++k) rule.codes[k] = R::codes[k];
  return rule;
}

// The rules and forms of every kernel library of this build.
#define FUSEDOPT_RULE(name, R) describe<R<double>>(#name),
constexpr Rule rules[] = {FUSEDOPT_RULES(FUSEDOPT_RULE)};
#undef FUSEDOPT_RULE
#define FUSEDOPT_FORM(W, G, S) Storage<W, G, S>::form,
constexpr Form forms[] = {FUSEDOPT_FORMATS(FUSEDOPT_FORM)};
#undef FUSEDOPT_FORM
#define FUSEDOPT_NUMBER(name, R) name##_number,
enum { FUSEDOPT_RULES(FUSEDOPT_NUMBER) kRules };
#undef FUSEDOPT_NUMBER
constexpr int kForms = int(sizeof(forms) / sizeof(Form));
constexpr int number_of(const Form& form) {
  int f = 0;
  while (!(forms[f] == form)) ++f;
  return f;
}

}  // namespace
}  // namespace fusedopt
