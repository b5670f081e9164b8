// exp, log, tanh and similar functions of one element, from basic operations: those of C libraries differ in the last
// bits, and a loop with such a call is not vectorised. Accurate to about 2 ULP.
#pragma once
#include "rules/formats.h"

namespace fusedopt {
namespace {

template <class T>
struct Constants;

template <>
struct Constants<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr Bits bias = 127;
  static constexpr float integer = 12582912.0f;        // 1.5 * 2^23: adding and subtracting it rounds to an integer
  static constexpr float lowest = -104, highest = 89;  // below: exp is 0; above: infinite
  static constexpr float least = -87;                  // the least x whose exp is a normal number
  static constexpr float per_ln2 = 1.44269504f, ln2_high = 0.693147182f, ln2_low = -1.90465421e-9f;
  // (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, to 6e-8 of it
  static constexpr float exp_tail[] = {0.5f, 0.166665770f, 0.0416665546f, 0.00836317905f, 0.00139261836f};
  // atanh(s) / s - 1 over s^2
  static constexpr float atanh_tail[] = {1 / 3.f, 1 / 5.f, 1 / 7.f, 1 / 9.f, 1 / 11.f, 1 / 13.f, 1 / 15.f};
  // exp(z^2) erfc(z) (1 + z) as a polynomial in (z - 3.75) / (z + 3.75), to 1.2e-9
  static constexpr float erfc_scaled[] = {0.6915511761f,    -0.2068312599f,   0.1147967581f,   -0.04064774401f,
                                          -0.003100386115f, 0.01875246939f,   -0.01726967017f, 0.01006600823f,
                                          -0.003992890309f, 0.0008694361491f, 0.00010802634f,  -0.0001158969649f};
};

template <>
struct Constants<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr Bits bias = 1023;
  static constexpr double integer = 6755399441055744.0;
  static constexpr double lowest = -746, highest = 710, least = -708;
  static constexpr double per_ln2 = 1.4426950408889634, ln2_high = 0.6931471805599453, ln2_low = 2.3190468138462996e-17;
  static constexpr double exp_tail[] = {1 / 2.,       1 / 6.,        1 / 24.,        1 / 120.,
                                        1 / 720.,     1 / 5040.,     1 / 40320.,     1 / 362880.,
                                        1 / 3628800., 1 / 39916800., 1 / 479001600., 1 / 6227020800.};
  static constexpr double atanh_tail[] = {1 / 3.,  1 / 5.,  1 / 7.,  1 / 9.,  1 / 11., 1 / 13., 1 / 15., 1 / 17.,
                                          1 / 19., 1 / 21., 1 / 23., 1 / 25., 1 / 27., 1 / 29., 1 / 31., 1 / 33.};
  static constexpr double erfc_scaled[] = {
      // to 1.3e-18
      0.69155117605643306,    -0.20683126504048675,    0.11479674120104219,    -0.040647578516886296,
      -0.003099809054730998,  0.018750997232613664,    -0.017275087309637126,  0.010070828133403329,
      -0.0039718085580049092, 0.00086504525616105211,  7.0625410300739446e-5,  -0.00012112765089409226,
      2.7616809372921314e-5,  8.1005285383893478e-6,   -5.3489536252305924e-6, -1.5769884310805162e-7,
      7.862147884467881e-7,   -6.325277330123252e-8,   -1.158571741949213e-7,  1.3789940561040796e-8,
      1.8069430299977679e-8,  -6.1981131655012237e-10, -2.2637329240718771e-9, -3.9649985305885874e-10};
};

// c[K] + c[K + 1] x + ...; unrolled by the template, which a vectorised loop needs.
template <int K, class T, int N>
FUSEDOPT_HD T horner(const T (&c)[N], T x) {
  if constexpr (K + 1 == N)
    return c[K];
  else
    return fma1(horner<K + 1>(c, x), x, c[K]);
}

// 2^n for an integer n of a normal exponent.
template <class T>
FUSEDOPT_HD T two_to(T n) {
  using C = Constants<T>;
  return bits<T>((bits<typename C::Bits>(n + C::integer) + C::bias) << C::mantissa);
}

// x = n ln 2 + r with an integer n; returns exp(r) - 1.
template <class T>
FUSEDOPT_HD T exp_reduced(T x, T* n) {
  using C = Constants<T>;
  *n = fma1(x, C::per_ln2, C::integer) - C::integer;
  const T r = fma1(-*n, C::ln2_low, fma1(-*n, C::ln2_high, x));
  return fma1(r * r, horner<0>(C::exp_tail, r), r);
}

template <class T>
FUSEDOPT_HD T exp1(T x) {
  using C = Constants<T>;
  x = x < C::lowest ? C::lowest : x;
  x = x > C::highest ? C::highest : x;
  T n;
  const T p = T(1) + exp_reduced(x, &n);
  const T half = fma1(n, T(0.5), C::integer) - C::integer;  // in two factors: 2^n alone may not be a normal number
  return p * two_to(half) * two_to(n - half);
}

// exp(x) for x <= 0, and 0 where that is subnormal: negligible in a sum with exp(0).
template <class T>
FUSEDOPT_HD T exp_negative(T x) {
  using C = Constants<T>;
  T n;
  const T p = (T(1) + exp_reduced(x < C::least ? C::least : x, &n)) * two_to(n);
  return x < C::least ? T(0) : p;
}

// exp(x) - 1 for x <= 0, without losing digits where x is small.
template <class T>
FUSEDOPT_HD T expm1_negative(T x) {
  x = x < T(-50) ? T(-50) : x;
  T n;
  const T p = exp_reduced(x, &n), scale = two_to(n);
  return fma1(p, scale, scale - T(1));
}

// log(1 + e) for 0 <= e <= 1, as 2 atanh(e / (2 + e)).
template <class T>
FUSEDOPT_HD T log1p_unit(T e) {
  const T s = e / (T(2) + e), s2 = s * s;
  return T(2) * fma1(s * s2, horner<0>(Constants<T>::atanh_tail, s2), s);
}

// log(x) for a normal x > 0; maps infinity and NaN to themselves.
FUSEDOPT_HD double log1(double x) {
  using C = Constants<double>;
  if (!(x <= 1.7976931348623157e308)) return x;
  const uint64_t b = bits<uint64_t>(x);
  double n = double(int64_t(b >> 52) - 1023), m = bits<double>((b & 0xfffffffffffffu) | (C::bias << 52));
  if (m > 1.4142135623730951) m *= 0.5, n += 1;
  const double s = (m - 1) / (m + 1), s2 = s * s;
  return fma1(n, C::ln2_high, fma1(n, C::ln2_low, 2 * fma1(s * s2, horner<0>(C::atanh_tail, s2), s)));
}

template <class T>
FUSEDOPT_HD T tanh1(T x) {
  const T e = expm1_negative(T(-2) * magnitude(x)), t = -e / (T(2) + e);
  return x < T(0) ? -t : t;
}

template <class T>
FUSEDOPT_HD T logistic1(T x) {
  const T e = exp1(-magnitude(x)), r = T(1) / (T(1) + e);
  return x >= T(0) ? r : e * r;
}

// The normal distribution function at x; `density` receives its density.
template <class T>
FUSEDOPT_HD T normal1(T x, T* density) {
  using C = Constants<T>;
  T a = magnitude(x);
  a = a > T(56) ? T(56) : a;
  const T square = a * a, lost = fma1(a, a, -square);
  const T rounded = exp1(T(-0.5) * square), e = fma1(T(-0.5) * lost, rounded, rounded);
  const T z = a * T(0.70710678118654752), t = (z - T(3.75)) / (z + T(3.75));
  const T tail = T(0.5) * e * horner<0>(C::erfc_scaled, t) / (T(1) + z);
  *density = e * T(0.39894228040143268);
  return x > T(0) ? T(1) - tail : tail;
}

}  // namespace
}  // namespace fusedopt
