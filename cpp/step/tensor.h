// The arguments of a step: tensors with their operands and counters, groups of hyperparameters, factors of the
// gradients. Pointers and lengths, independent of Python, arithmetic and instruction sets.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "cpu/dispatch.h"

namespace fusedopt {

constexpr int kMaxDims = 64;
constexpr int kOperands = 4 + kMaxStates;  // param, grad, states, residual, moving average
constexpr int kHost = -1;                  // used as the number of a device

// A scalar in memory: a step count, a carried product, a learning rate, a norm.
struct Scalar {
  void* at = nullptr;
  bool wide = false;  // float64, else float32
  int device = kHost;

  int64_t size() const { return wide ? sizeof(double) : sizeof(float); }
  double get() const { return wide ? *static_cast<double*>(at) : double(*static_cast<float*>(at)); }
  void set(double x) const {
    if (wide) {
      *static_cast<double*>(at) = x;
    } else {
      *static_cast<float*>(at) = float(x);
    }
  }
};

// Hyperparameters shared by tensors.
struct Group {
  std::vector<double> hyper;  // the learning rate first
  bool maximize;
  double l1 = 0, ema_weight = 0;  // ema_weight: 1 - ema_decay
  uint64_t seed = 0;
  Scalar lr = {};  // on a device, which reads it in place of hyper[0]
};

// The layout of operands that are not all dense and alike: traversed in logical order, one tile at a time.
struct Strided {
  int n, ndim;  // operands, dimensions
  int64_t shape[kMaxDims];
  int64_t stride[kOperands][kMaxDims];  // in elements
};

// A gradient by rows of the parameter, the table: an index for each lookup, and a row of values. A row may be looked up
// several times, and most are not at all. Rows are contiguous; those of values may have strides of their own.
struct Lookups {
  const void* indices;                             // nullptr: every row in turn
  bool wide;                                       // int64, else int32
  int64_t index_stride;                            // in elements, as are all below
  int64_t n;                                       // lookups
  int64_t rows, width;                             // of the table; elements of a row
  int64_t stride[kOperands];                       // between rows, by operand; of the gradient between lookups
  std::vector<int64_t> inner_shape, inner_stride;  // of a lookup's values; empty: contiguous
  // A number for each row, or no memory. steps: in which the row occurred, counted in place of the table's steps.
  // sum: of the mean squares of the row's gradients; the rule is then row-wise Adagrad, see rows.cpp.
  float* steps = nullptr;
  Scalar sum = {};
};

// One parameter with its gradient, states and counters. The order of operands is: param, grad, the rule's states, the
// residual if any, the moving average if any.
struct Tensor {
  Span span;               // of the whole tensor
  const Strided* strided;  // nullptr: all operands are dense and alike
  const Lookups* rows;     // nullptr: the gradient has the parameter's shape
  KernelId kernel;
  int group;
  int64_t sequence;  // selects its random numbers
  // Steps done and the carried number, read from and written to `step` and `carry` if those have memory; else `done`,
  // if not nullptr, receives the steps done. Step::run alone advances it.
  Clock clock;
  Scalar step, carry;
  int64_t* done;
  bool device_counts;  // without `step`, on a device: the device counts the executed steps itself, from clock.t

  // Counts a step of a tensor on the host.
  void advance(const Group& of);
};

// The factors of every gradient. Scalars that have memory are on the tensors' device.
struct Scaling {
  double unscale = 1;   // 1 / grad_scale
  double max_norm = 0;  // 0: no clipping
  Scalar found_inf = {}, grad_scale = {};
  Scalar norm = {};  // receives the norm if max_norm > 0
};

Format ema_format(Format param);  // of the moving average of a weight
const char* name_of(Format format);
const char* name_of(Master master);  // "" for none

#if defined(__GNUC__) || defined(__clang__)
// GCC considers a function whose body is a prefetch free of side effects and removes its calls; the asm prevents this.
inline void prefetch(const void* at) {
  __builtin_prefetch(at);
  asm volatile("");
}
// Into the second cache.
inline void prefetch_far(const void* at) {
  __builtin_prefetch(at, 0, 2);
  asm volatile("");
}
#else
inline void prefetch(const void*) {}
inline void prefetch_far(const void*) {}
#endif
inline const char* line(const void* at, int n) { return static_cast<const char*>(at) + 64 * n; }

}  // namespace fusedopt
