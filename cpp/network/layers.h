// The loops of a network's layers between the matrix products: bias and activation, their gradients, dropout, batch
// normalisation. Each call handles some rows; network.cpp splits the rows and adds the sums. Also the matrix products
// of linear models with few weights; all others are BLAS's.
#pragma once
#include "network/functions.h"
#include "network/network.h"

namespace fusedopt {
namespace {

// An activation, and its derivative as a function of its output, or of its input if `from_input`.
struct Identity {
  static constexpr bool from_input = false;
  template <class T>
  static FUSEDOPT_HD T value(T x) {
    return x;
  }
  template <class T>
  static FUSEDOPT_HD T slope(T) {
    return T(1);
  }
};

struct Relu {
  static constexpr bool from_input = false;
  template <class T>
  static FUSEDOPT_HD T value(T x) {
    return x < T(0) ? T(0) : x;  // NaN stays
  }
  template <class T>
  static FUSEDOPT_HD T slope(T y) {
    return y > T(0) ? T(1) : T(0);
  }
};

struct Tanh {
  static constexpr bool from_input = false;
  template <class T>
  static FUSEDOPT_HD T value(T x) {
    return tanh1(x);
  }
  template <class T>
  static FUSEDOPT_HD T slope(T y) {
    return T(1) - y * y;
  }
};

struct Logistic {
  static constexpr bool from_input = false;
  template <class T>
  static FUSEDOPT_HD T value(T x) {
    return logistic1(x);
  }
  template <class T>
  static FUSEDOPT_HD T slope(T y) {
    return y * (T(1) - y);
  }
};

struct Gelu {
  static constexpr bool from_input = true;
  template <class T>
  static FUSEDOPT_HD T value(T x) {
    T density;
    return x * normal1(x, &density);
  }
  template <class T>
  static FUSEDOPT_HD T slope(T x) {
    T density;
    const T below = normal1(x, &density);
    return fma1(x, density, below);
  }
};

template <class A, class T>
void forward(const LayerSpan& s) {
  auto* bias = static_cast<const T*>(s.a);
  for (int64_t r = 0; r < s.rows; ++r) {
    auto* z = static_cast<const T*>(s.in) + r * s.columns;
    auto* out = static_cast<T*>(s.out) + r * s.columns;
    if (s.more) {
      auto* kept = static_cast<T*>(s.more) + r * s.columns;
      FUSEDOPT_INDEPENDENT
      for (int64_t c = 0; c < s.columns; ++c) {
        const T x = bias ? z[c] + bias[c] : z[c];
        kept[c] = x;
        out[c] = A::value(x);
      }
    } else if (bias) {
      FUSEDOPT_INDEPENDENT
      for (int64_t c = 0; c < s.columns; ++c) out[c] = A::value(z[c] + bias[c]);
    } else {
      FUSEDOPT_INDEPENDENT
      for (int64_t c = 0; c < s.columns; ++c) out[c] = A::value(z[c]);
    }
  }
}

// Adds at most kColumnBlock rows of T into sums of doubles.
constexpr int64_t kColumnTile = 256;

template <class T, class F>
FUSEDOPT_HD void add_columns(const LayerSpan& s, double* sums, const F& element) {
  T part[kColumnTile];
  for (int64_t begin = 0; begin < s.columns; begin += kColumnTile) {
    const int64_t n = s.columns - begin < kColumnTile ? s.columns - begin : kColumnTile;
    for (int64_t c = 0; c < n; ++c) part[c] = T(0);
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t row = r * s.columns + begin;
      FUSEDOPT_INDEPENDENT
      for (int64_t c = 0; c < n; ++c) part[c] += element(row + c, begin + c);
    }
    for (int64_t c = 0; c < n; ++c) sums[begin + c] = double(part[c]);
  }
}

template <class A, class T>
void backward(const LayerSpan& s) {
  auto* kept = static_cast<const T*>(s.in);
  auto* delta = static_cast<T*>(s.out);
  add_columns<T>(s, s.sums, [=](int64_t i, int64_t) {
    const T d = delta[i] * A::slope(kept[i]);
    delta[i] = d;
    return d;
  });
}

template <class T>
void column_sums(const LayerSpan& s) {
  auto* x = static_cast<const T*>(s.in);
  add_columns<T>(s, s.sums, [=](int64_t i, int64_t) { return x[i]; });
}

template <class T>
void column_squares(const LayerSpan& s) {
  auto *x = static_cast<const T*>(s.in), *mean = static_cast<const T*>(s.a);
  add_columns<T>(s, s.sums, [=](int64_t i, int64_t c) { return (x[i] - mean[c]) * (x[i] - mean[c]); });
}

template <class T>
void normalize(const LayerSpan& s) {
  auto *mean = static_cast<const T*>(s.a), *rate = static_cast<const T*>(s.b);
  auto *gain = static_cast<const T*>(s.c), *shift = static_cast<const T*>(s.d);
  for (int64_t r = 0; r < s.rows; ++r) {
    auto* x = static_cast<const T*>(s.in) + r * s.columns;
    auto* normal = static_cast<T*>(s.more) + r * s.columns;
    auto* out = static_cast<T*>(s.out) + r * s.columns;
    FUSEDOPT_INDEPENDENT
    for (int64_t c = 0; c < s.columns; ++c) {
      const T n = (x[c] - mean[c]) * rate[c];
      normal[c] = n;
      out[c] = fma1(n, gain[c], shift[c]);
    }
  }
}

template <class T>
void normal_sums(const LayerSpan& s) {
  auto *delta = static_cast<const T*>(s.in), *normal = static_cast<const T*>(s.other);
  add_columns<T>(s, s.sums, [=](int64_t i, int64_t) { return delta[i]; });
  add_columns<T>(s, s.sums + s.columns, [=](int64_t i, int64_t) { return delta[i] * normal[i]; });
}

template <class T>
void normal_back(const LayerSpan& s) {
  auto *rate = static_cast<const T*>(s.a), *mean = static_cast<const T*>(s.b), *slope = static_cast<const T*>(s.c);
  for (int64_t r = 0; r < s.rows; ++r) {
    auto* delta = static_cast<const T*>(s.in) + r * s.columns;
    auto* normal = static_cast<const T*>(s.other) + r * s.columns;
    auto* out = static_cast<T*>(s.out) + r * s.columns;
    FUSEDOPT_INDEPENDENT
    for (int64_t c = 0; c < s.columns; ++c) out[c] = rate[c] * (delta[c] - mean[c] - normal[c] * slope[c]);
  }
}

template <class T>
void products(const ProductSpan& s, const void* weights, void* to) {
  auto *x = static_cast<const T*>(s.x), *w = static_cast<const T*>(weights);
  auto* out = static_cast<T*>(to);
  for (int64_t r = 0; r < s.rows; ++r)
    for (int64_t o = 0; o < s.outputs; ++o) {
      const T *a = x + r * s.width, *b = w + o * s.width;
      T part[kProductLanes] = {};
      for (int64_t c = 0; c < s.width; c += kProductLanes)
        for (int k = 0; k < kProductLanes; ++k) part[k] += a[c + k] * b[c + k];
      out[r * s.outputs + o] =
          ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
    }
}

template <class T>
void products_back(const ProductSpan& s, const void* deltas, void* to) {
  auto *x = static_cast<const T*>(s.x), *delta = static_cast<const T*>(deltas);
  for (int64_t o = 0; o < s.outputs; ++o) {
    T* out = static_cast<T*>(to) + o * s.width;
    for (int64_t c = 0; c < s.width; ++c) out[c] = T(0);
    for (int64_t r = 0; r < s.rows; ++r) {
      const T d = delta[r * s.outputs + o];
      const T* row = x + r * s.width;
      FUSEDOPT_INDEPENDENT
      for (int64_t c = 0; c < s.width; ++c) out[c] += d * row[c];
    }
  }
}

template <class T>
void dropout(const void* from, void* to, int64_t begin, int64_t n, const DropoutKey& key) {
  auto* x = static_cast<const T*>(from) + begin;
  auto* y = static_cast<T*>(to) + begin;
  const T scale = T(key.scale);
  const uint32_t start = uint32_t(begin), threshold = key.threshold;
  const uint32_t low = key.low, high = scrambled(key.high + uint32_t(uint64_t(begin) >> 32));
  FUSEDOPT_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t random = scrambled(scrambled((start + uint32_t(i)) ^ low) + high);
    y[i] = random < threshold ? T(0) : x[i] * scale;
  }
}

#define FUSEDOPT_BOTH(f) {f<double>, f<float>}
#define FUSEDOPT_ACTIVATIONS(f)                                                                                      \
  {                                                                                                                  \
    {f<Identity, double>, f<Identity, float>}, {f<Relu, double>, f<Relu, float>}, {f<Tanh, double>, f<Tanh, float>}, \
        {f<Logistic, double>, f<Logistic, float>}, {                                                                 \
      f<Gelu, double>, f<Gelu, float>                                                                                \
    }                                                                                                                \
  }

}  // namespace
}  // namespace fusedopt
