// What a step is given: tensors with their operands and counters, groups of hyperparameters, factors of the gradients.
// Pointers and lengths; nothing of Python, arithmetic or instruction sets.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "cpu/dispatch.h"

namespace fusedopt {

constexpr int kMaxDims = 64;
constexpr int kOperands = 4 + kMaxStates;  // param, grad, states, residual, moving average
constexpr int kHost = -1;                  // in place of a device's number

// A number in memory: a step count, a carried product, a learning rate, a norm.
struct Scalar {
  void* at = nullptr;
  bool wide = false;  // float64, else float32
  int device = kHost;

  double get() const { return wide ? *static_cast<double*>(at) : double(*static_cast<float*>(at)); }
  void set(double x) const {
    if (wide) {
      *static_cast<double*>(at) = x;
    } else {
      *static_cast<float*>(at) = float(x);
    }
  }
};

// Operands that do not share one dense layout: walked in logical order, a tile at a time.
struct Strided {
  int n, ndim;  // operands, dimensions
  int64_t shape[kMaxDims];
  int64_t stride[kOperands][kMaxDims];  // in elements
};

// One parameter with its gradient, states and counters. Operands are counted in this order: param, grad, the rule's
// states, then of residual and moving average those that there are.
struct Tensor {
  Span span;               // of the whole tensor
  const Strided* strided;  // nullptr: dense, all operands alike
  KernelId kernel;
  int group;
  int64_t sequence;  // selects its random numbers
  // Steps done and the carried number. Where `step` and `carry` have memory they are read from it and written to it;
  // else `done`, where it has an address, is set to the steps done. A step counts once, in Step::run.
  Clock clock;
  Scalar step, carry;
  int64_t* done;
  bool device_counts;  // without `step`, on a device: it counts the executed steps itself, from clock.t on
};

// Hyperparameters shared by tensors.
struct Group {
  std::vector<double> hyper;  // the learning rate first
  bool maximize;
  double l1 = 0, ema_weight = 0;  // ema_weight: a parameter's share in its average
  uint64_t seed = 0;
  Scalar lr = {};  // on a device; read there in place of hyper[0]
};

// The factors that a step puts on every gradient. Scalars, where they have memory, are on the tensors' device.
struct Scaling {
  double unscale = 1;   // 1 / grad_scale
  double max_norm = 0;  // 0: no clipping
  Scalar found_inf = {}, grad_scale = {};
  Scalar norm = {};  // receives the norm if max_norm > 0
};

// The format of the residual of a weight, and of its moving average.
Format residual_format(Master master);
Format ema_format(Format param);
size_t size_of(Format format);
const char* name_of(Format format);
const char* name_of(Master master);  // "" for none

#if defined(__GNUC__) || defined(__clang__)
// GCC takes a function that does nothing but prefetch to have no effect, and removes calls of it; not with an asm
// inside.
inline void prefetch(const void* at) {
  __builtin_prefetch(at);
  asm volatile("");
}
#else
inline void prefetch(const void*) {}
#endif
inline const char* line(const void* at, int n) { return static_cast<const char*>(at) + 64 * n; }

}  // namespace fusedopt
