// The arithmetic that rules use on one element, with the same bits on every host and device. Nothing here depends on
// arrays, formats or threads.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "rules/compiler.h"

namespace fusedopt {
// Internal linkage: each object file has its own copy, so the linker cannot merge code of different instruction sets.
namespace {

// The number of words in a text, separated by blanks.
constexpr int words(const char* s) {
  int n = 0;
  for (bool in = false; *s; ++s) {
    if (*s != ' ' && !in) ++n;
    in = *s != ' ';
  }
  return n;
}

// 0, 1, ..., N - 1 as a parameter pack. (std:: templates have external linkage and would be merged by the linker.)
template <size_t... k>
struct Indices {};
template <int N, size_t... k>
struct IndicesTo : IndicesTo<N - 1, N - 1, k...> {};
template <size_t... k>
struct IndicesTo<0, k...> {
  using type = Indices<k...>;
};

// a * b + c, rounded once. The compiler contracts nothing, so a rule writes fma1 where it wants one. (`make cuda` also
// compiles without: any fused operation that it then finds was contracted by the compiler.)
#ifdef FUSEDOPT_NO_FMA
FUSEDOPT_HD float fma1(float a, float b, float c) { return a * b + c; }
FUSEDOPT_HD double fma1(double a, double b, double c) { return a * b + c; }
#else
FUSEDOPT_HD float fma1(float a, float b, float c) { return fmaf(a, b, c); }
FUSEDOPT_HD double fma1(double a, double b, double c) { return fma(a, b, c); }
#endif
FUSEDOPT_HD float root(float x) { return sqrtf(x); }
FUSEDOPT_HD double root(double x) { return sqrt(x); }
FUSEDOPT_HD float magnitude(float x) { return fabsf(x); }
FUSEDOPT_HD double magnitude(double x) { return fabs(x); }
FUSEDOPT_HD float signed_as(float x, float y) { return copysignf(x, y); }

// The larger of two; NaN if either is NaN.
template <class T>
FUSEDOPT_HD T maximum(T a, T b) {
  return (a > b || a != a) ? a : b;
}

// -1, 0 or 1; NaN stays NaN.
template <class T>
FUSEDOPT_HD T sign(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : x;
}

// a + w (b - a), from the nearer end as torch.lerp does, so that w = 1 gives b exactly.
template <class T>
FUSEDOPT_HD T lerp(T a, T b, T w) {
  T d = b - a;
  return w < T(0.5) ? fma1(w, d, a) : b - d * (T(1) - w);
}

// g + decay * p, and g itself (not g + 0 * p) when there is no decay.
template <class T>
FUSEDOPT_HD T decayed(T g, T p, T decay) {
  return decay != T(0) ? fma1(decay, p, g) : g;
}

// The bits of a number.
template <class To, class From>
FUSEDOPT_HD To bits(From x) {
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// A 32-bit bijective hash: two rounds of multiplication and xor-shift (lowbias32, constants by C. Wellons).
FUSEDOPT_HD uint32_t scrambled(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// 32 random bits for position i of the sequence `key`, counter-based: they do not depend on numbers drawn before.
FUSEDOPT_HD uint32_t noise(uint32_t key, uint32_t i) { return scrambled(i * 0x9e3779b9u + key); }

// A 64-bit hash of two numbers (the finaliser of splitmix64).
FUSEDOPT_HD uint64_t mixed(uint64_t a, uint64_t b) {
  uint64_t x = a + (b + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The key of a tensor's random numbers in step t.
FUSEDOPT_HD uint32_t noise_key(uint64_t seed, int64_t t, int64_t sequence) {
  return uint32_t(mixed(mixed(seed, uint64_t(t)), uint64_t(sequence)));
}

// The factor of gradients of this norm, as in torch.nn.utils.clip_grad_norm_: at most 1. NaN stays NaN.
FUSEDOPT_HD double clip_factor(double max_norm, double norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor >= 1 ? 1 : factor;
}

// b^n by repeated squaring, since `pow` of different C libraries differs in the last bit. The rounding error of each
// product is carried along, because 1 - b^n would magnify it.
FUSEDOPT_HD double power(double b, int64_t n) {
  double r = 1, r_low = 0, b_low = 0;
  for (; n > 0; n >>= 1) {
    if (n & 1) {
      double p = r * b;
      r_low = fma1(r, b, -p) + (r * b_low + r_low * b);
      r = p;
    }
    double p = b * b;
    b_low = fma1(b, b, -p) + 2 * b * b_low;
    b = p;
  }
  return r + r_low;
}

// exp(x) for x in [-700, 0], from basic operations for the same reason.
FUSEDOPT_HD double exponential(double x) {
  int64_t halvings = 0;
  while (x < -0.03125) x *= 0.5, ++halvings;
  double term = 1, sum = 0;  // exp(x) - 1: squaring it loses no digits while it is small
  for (int k = 1; k < 10; ++k) sum += term *= x / k;
  for (; halvings > 0; --halvings) sum = sum * (2 + sum);
  return 1 + sum;
}

}  // namespace
}  // namespace fusedopt
