// Losses: value and derivative of ONE element, the registry, and the loops over ranges; softmax over rows. Letters as
// in the docstrings: p prediction (or logit), y target, d their difference.
#pragma once
#include "network/functions.h"
#include "network/network.h"

namespace fusedopt {
namespace {

// A loss is a struct constructed from its one parameter; `targets` states the values that y may have.
template <Targets kind = kAnyTarget>
struct PlainLoss {
  static constexpr Targets targets = kind;
  FUSEDOPT_HD explicit PlainLoss(double) {}
};

template <class T>
struct SquaredError : PlainLoss<> {
  using PlainLoss::PlainLoss;
  FUSEDOPT_HD void operator()(T p, T y, T& loss, T& slope) const {
    const T d = p - y;
    loss = d * d;
    slope = d + d;
  }
};

template <class T>
struct HalfSquaredError : PlainLoss<> {
  using PlainLoss::PlainLoss;
  FUSEDOPT_HD void operator()(T p, T y, T& loss, T& slope) const {
    slope = p - y;
    loss = T(0.5) * slope * slope;
  }
};

template <class T>
struct AbsoluteError : PlainLoss<> {
  using PlainLoss::PlainLoss;
  FUSEDOPT_HD void operator()(T p, T y, T& loss, T& slope) const {
    loss = magnitude(p - y);
    slope = sign(p - y);
  }
};

template <class T>
struct Huber {
  static constexpr Targets targets = kAnyTarget;
  T delta;
  FUSEDOPT_HD explicit Huber(double parameter) : delta(T(parameter)) {}
  FUSEDOPT_HD void operator()(T p, T y, T& loss, T& slope) const {
    const T d = p - y, a = magnitude(d);
    const bool far = a > delta;
    loss = far ? delta * (a - T(0.5) * delta) : T(0.5) * d * d;
    slope = far ? delta * sign(d) : d;
  }
};

template <class T>
struct EpsilonInsensitive {
  static constexpr Targets targets = kAnyTarget;
  T epsilon;
  FUSEDOPT_HD explicit EpsilonInsensitive(double parameter) : epsilon(T(parameter)) {}
  FUSEDOPT_HD void operator()(T p, T y, T& loss, T& slope) const {
    const T d = p - y, over = magnitude(d) - epsilon;
    loss = over <= T(0) ? T(0) : over;  // NaN stays
    slope = over <= T(0) ? T(0) : sign(d);
  }
};

template <class T>
struct SquaredEpsilonInsensitive : EpsilonInsensitive<T> {
  using EpsilonInsensitive<T>::EpsilonInsensitive;
  FUSEDOPT_HD void operator()(T p, T y, T& loss, T& slope) const {
    T over, side;
    EpsilonInsensitive<T>::operator()(p, y, over, side);
    loss = over * over;
    slope = T(2) * over * side;
  }
};

// -y log s(p) - (1 - y) log(1 - s(p)) with the logistic s.
template <class T>
struct BinaryCrossEntropy : PlainLoss<kZeroToOne> {
  using PlainLoss<kZeroToOne>::PlainLoss;
  FUSEDOPT_HD void operator()(T p, T y, T& loss, T& slope) const {
    const T e = exp1(-magnitude(p)), r = T(1) / (T(1) + e);
    loss = (p <= T(0) ? T(0) : p) - p * y + log1p_unit(e);
    slope = (p >= T(0) ? r : e * r) - y;
  }
};

template <class T>
struct Hinge : PlainLoss<kPlusMinusOne> {
  using PlainLoss<kPlusMinusOne>::PlainLoss;
  FUSEDOPT_HD void operator()(T p, T y, T& loss, T& slope) const {
    const T short_of = T(1) - y * p;
    loss = short_of <= T(0) ? T(0) : short_of;
    slope = short_of <= T(0) ? T(0) : -y;
  }
};

template <class T>
struct SquaredHinge : PlainLoss<kPlusMinusOne> {
  using PlainLoss<kPlusMinusOne>::PlainLoss;
  FUSEDOPT_HD void operator()(T p, T y, T& loss, T& slope) const {
    const T short_of = T(1) - y * p, m = short_of <= T(0) ? T(0) : short_of;
    loss = m * m;
    slope = T(-2) * y * m;
  }
};

// The squared hinge, linear below a margin of -1, which bounds the gradient of outliers.
template <class T>
struct ModifiedHuber : PlainLoss<kPlusMinusOne> {
  using PlainLoss<kPlusMinusOne>::PlainLoss;
  FUSEDOPT_HD void operator()(T p, T y, T& loss, T& slope) const {
    const T margin = y * p, short_of = T(1) - margin, m = short_of <= T(0) ? T(0) : short_of;
    loss = margin < T(-1) ? T(-4) * margin : m * m;
    slope = margin < T(-1) ? T(-4) * y : T(-2) * y * m;
  }
};

template <class T>
struct Perceptron : PlainLoss<kPlusMinusOne> {
  using PlainLoss<kPlusMinusOne>::PlainLoss;
  FUSEDOPT_HD void operator()(T p, T y, T& loss, T& slope) const {
    const T m = y * p;
    loss = m > T(0) ? T(0) : -m;
    slope = m > T(0) ? T(0) : -y;
  }
};

// exp(p) - y p: the Poisson likelihood of a count y with predicted logarithm p, without terms independent of p.
template <class T>
struct Poisson : PlainLoss<kNotNegative> {
  using PlainLoss<kNotNegative>::PlainLoss;
  FUSEDOPT_HD void operator()(T p, T y, T& loss, T& slope) const {
    const T e = exp1(p);
    loss = e - y * p;
    slope = e - y;
  }
};

// The registry of losses of single elements: name, struct.
#define FUSEDOPT_LOSSES(X)                                  \
  X(mse, SquaredError)                                      \
  X(half_mse, HalfSquaredError)                             \
  X(mae, AbsoluteError)                                     \
  X(huber, Huber)                                           \
  X(epsilon_insensitive, EpsilonInsensitive)                \
  X(squared_epsilon_insensitive, SquaredEpsilonInsensitive) \
  X(binary_cross_entropy, BinaryCrossEntropy)               \
  X(hinge, Hinge)                                           \
  X(squared_hinge, SquaredHinge)                            \
  X(modified_huber, ModifiedHuber)                          \
  X(perceptron, Perceptron)                                 \
  X(poisson, Poisson)

constexpr int kSumLanes = 16;

// The sum of up to kLossBlock numbers, over the same lanes on every instruction set, then a fixed tree.
template <class T>
FUSEDOPT_HD double lane_sum(const T* x, int64_t n) {
  T lane[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int k = 0; k < kSumLanes; ++k) lane[k] += x[i + k];
  for (int k = 0; i < n; ++i, ++k) lane[k] += x[i];
  for (int width = kSumLanes / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) lane[k] += lane[k + width];
  return double(lane[0]);
}

template <class T>
FUSEDOPT_HD double long_sum(const T* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += kLossTile) sum += lane_sum(x + i, n - i < kLossTile ? n - i : kLossTile);
  return sum;
}

// The largest number, ignoring NaN. The order of comparisons does not matter, so lanes are used where they are faster.
template <class T>
FUSEDOPT_HD T largest(const T* x, int64_t n) {
  constexpr int kLanes = 64;
  T top = T(-INFINITY);
  int64_t i = 0;
  if (n >= 2 * kLanes) {
    T lane[kLanes];
    for (int k = 0; k < kLanes; ++k) lane[k] = top;
    for (; i + kLanes <= n; i += kLanes)
      for (int k = 0; k < kLanes; ++k) lane[k] = x[i + k] > lane[k] ? x[i + k] : lane[k];
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int k = 0; k < width; ++k) lane[k] = lane[k + width] > lane[k] ? lane[k + width] : lane[k];
    top = lane[0];
  }
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

template <class Loss, class T>
double element_loss(const LossSpan& s) {
  const Loss loss(s.parameter);
  const T scale = T(s.scale);
  const T* weights = static_cast<const T*>(s.weight);
  T value[kLossTile], weight[kLossTile];
  if (!weights)
    for (int64_t i = 0; i < kLossTile; ++i) weight[i] = T(1);
  double sum = 0;
  for (int64_t begin = 0; begin < s.n; begin += kLossTile) {
    const int64_t n = s.n - begin < kLossTile ? s.n - begin : kLossTile, first = s.begin + begin;
    if (weights && s.per_weight == 1)
      memcpy(weight, weights + first, size_t(n) * sizeof(T));
    else if (weights)
      for (int64_t i = 0, row = first / s.per_weight, end = (row + 1) * s.per_weight - first; i < n; ++row) {
        for (; i < n && i < end; ++i) weight[i] = weights[row];
        end += s.per_weight;
      }
    const T* p = static_cast<const T*>(s.prediction) + first;
    const T* y = static_cast<const T*>(s.target) + first;
    T* g = static_cast<T*>(s.gradient) + first;
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      T l, slope;
      loss(p[i], y[i], l, slope);
      value[i] = l * weight[i];
      g[i] = slope * weight[i] * scale;
    }
    if (s.value) memcpy(static_cast<T*>(s.value) + first, value, size_t(n) * sizeof(T));
    sum += lane_sum(value, n);
  }
  return sum;
}

template <class T>
int64_t unfit(const void* target, int64_t n, Targets targets) {
  auto* y = static_cast<const T*>(target);
  const T low = targets == kPlusMinusOne ? T(-1) : T(0), infinite = T(INFINITY);
  const T high = targets == kNotNegative ? infinite : T(1);
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += kLossTile) {
    int wrong = 0;
    const int64_t end = begin + kLossTile < n ? begin + kLossTile : n;
    if (targets == kPlusMinusOne)
      for (int64_t i = begin; i < end; ++i) wrong += !(y[i] == low) & !(y[i] == high);
    else
      for (int64_t i = begin; i < end; ++i) wrong += !(y[i] >= low) | !(y[i] <= high) | (y[i] == infinite);
    count += wrong;
  }
  return count;
}

// With p = softmax(x) and a target t that includes class weights and smoothing:
// loss = -sum_c t_c log p_c, slope_c = p_c sum(t) - t_c.
template <class T>
double softmax_loss(const SoftmaxSpan& s) {
  const int64_t columns = s.columns;
  auto* x = static_cast<const T*>(s.logits);
  auto* targets = static_cast<const T*>(s.targets);
  auto* classes = static_cast<const T*>(s.class_weight);
  auto* g = static_cast<T*>(s.gradient);
  const T even = T(s.smoothing / double(columns)), kept = T(1 - s.smoothing), scale = T(s.scale);
  T tops[kLossBlock];  // the largest logit of each row
  const bool long_rows = columns >= 64;
  for (int64_t r = 0; r < s.rows; ++r) {
    const T *row = x + r * columns, top = largest(row, columns);
    T* e = g + r * columns;
    tops[r] = top;
    if (long_rows) {
      FUSEDOPT_INDEPENDENT
      for (int64_t c = 0; c < columns; ++c) e[c] = exp_negative(row[c] - top);
    } else {
      for (int64_t c = 0; c < columns; ++c) e[c] = row[c] - top;
    }
  }
  if (!long_rows) {  // one loop over all rows: a row may be shorter than a vector
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < s.rows * columns; ++i) g[i] = exp_negative(g[i]);
  }
  double sum = 0;
  for (int64_t r = 0; r < s.rows; ++r) {
    const T *row = x + r * columns, top = tops[r];
    T* slope = g + r * columns;
    const double total = long_sum(slope, columns), log_total = log1(total);
    const T weight = s.weight ? static_cast<const T*>(s.weight)[r] : T(1);
    const T factor = weight * scale;
    double loss;
    if (s.labels && s.smoothing == 0) {
      const int64_t y = s.labels[r];
      const T t = classes ? classes[y] : T(1), per_total = T(double(factor) * double(t) / total);
      loss = double(t) * (log_total - double(row[y] - top));
      FUSEDOPT_INDEPENDENT
      for (int64_t c = 0; c < columns; ++c) slope[c] *= per_total;
      slope[y] -= factor * t;
    } else {
      T mass[kLossTile], inner[kLossTile];
      double t_sum = 0, t_inner = 0;
      for (int pass = 0; pass < 2; ++pass) {  // the sums of t, then the slopes
        const T per_total = T(double(factor) * t_sum / total);
        for (int64_t begin = 0; begin < columns; begin += kLossTile) {
          const int64_t n = columns - begin < kLossTile ? columns - begin : kLossTile;
          if (targets)
            for (int64_t c = 0; c < n; ++c) mass[c] = fma1(kept, targets[r * columns + begin + c], even);
          else
            for (int64_t c = 0; c < n; ++c) mass[c] = even;
          if (s.labels && s.labels[r] >= begin && s.labels[r] < begin + n) mass[s.labels[r] - begin] += kept;
          if (classes)
            for (int64_t c = 0; c < n; ++c) mass[c] *= classes[begin + c];
          if (pass == 0) {
            for (int64_t c = 0; c < n; ++c) inner[c] = mass[c] != T(0) ? mass[c] * (row[begin + c] - top) : T(0);
            t_sum += lane_sum(mass, n);
            t_inner += lane_sum(inner, n);
          } else {
            FUSEDOPT_INDEPENDENT
            for (int64_t c = 0; c < n; ++c) slope[begin + c] = slope[begin + c] * per_total - factor * mass[c];
          }
        }
      }
      loss = t_sum * log_total - t_inner;
    }
    loss *= double(weight);
    if (s.value) static_cast<T*>(s.value)[r] = T(loss);
    sum += loss;
  }
  return sum;
}

template <class T>
double penalty(const PenaltySpan& s) {
  auto* w = static_cast<const T*>(s.weights);
  auto* g = static_cast<T*>(s.gradient);
  const T l1 = T(s.l1 * s.scale), l2 = T(s.l2 * s.scale);
  T term[kLossTile];
  double sum = 0;
  for (int64_t begin = 0; begin < s.n; begin += kLossTile) {
    const int64_t n = s.n - begin < kLossTile ? s.n - begin : kLossTile;
    const T* x = w + begin;
    if (s.l1 != 0) {
      for (int64_t i = 0; i < n; ++i) term[i] = magnitude(x[i]);
      sum += s.l1 * lane_sum(term, n);
    }
    if (s.l2 != 0) {
      for (int64_t i = 0; i < n; ++i) term[i] = x[i] * x[i];
      sum += 0.5 * s.l2 * lane_sum(term, n);
    }
    if (g && s.l1 != 0) {
      FUSEDOPT_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) g[begin + i] += fma1(l2, x[i], l1 * sign(x[i]));
    } else if (g) {
      FUSEDOPT_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) g[begin + i] = fma1(l2, x[i], g[begin + i]);
    }
  }
  return sum;
}

#define FUSEDOPT_LOSS(name, Loss) \
  {#name, Loss<double>::targets, {element_loss<Loss<double>, double>, element_loss<Loss<float>, float>}},
constexpr ElementLoss element_losses[] = {FUSEDOPT_LOSSES(FUSEDOPT_LOSS)};
#undef FUSEDOPT_LOSS

}  // namespace
}  // namespace fusedopt
