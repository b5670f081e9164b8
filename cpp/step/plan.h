// Many tensors seen as one flat range: what a step works on, split evenly, serial when small. Knows pointers and
// lengths; nothing of Python, arithmetic or instruction sets.
#pragma once
#include <stdint.h>

#include <vector>

#include "library.h"
#include "step/threads.h"

namespace fusedopt {

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

constexpr int kMaxDims = 64;
constexpr int kOperands = 4 + kMaxStates;  // param, grad, states, what is kept beside the weight, its average

// Operands that do not share one dense layout: walked in logical order, a tile at a time.
struct Strided {
  int n, ndim;  // operands, dimensions
  int64_t shape[kMaxDims];
  int64_t stride[kOperands][kMaxDims];  // in elements
};

// One tensor with its gradient and states. Operands are counted in this order: param, grad, the kernel's states, then
// of rest and ema those that are there.
struct Row {
  Span span;               // of the whole tensor
  const Strided* strided;  // nullptr: dense, all operands alike
  int kernel, loop, group;
  Clock clock;     // of the step to be done, so from 1
  int64_t stream;  // of its random numbers
};

// Hyperparameters shared by rows.
struct Group {
  std::vector<double> hyper;  // the learning rate first
  bool maximize;
  double l1 = 0, ema_weight = 0;  // a weight's share in its average
  uint64_t seed = 0;
};

// The factors that a step puts on every gradient.
struct Scaling {
  double unscale = 1;   // 1 / grad_scale
  double max_norm = 0;  // 0: no clipping
};

class Plan {
 public:
  std::vector<Row> rows;
  std::vector<Group> groups;

  // One step over all rows. Returns the global norm of the unscaled gradients when it clips, else -1.
  double run(const Scaling& scaling, Team team, int threads);
  // The norm of the gradients as they are.
  double norm(Team team, int threads);

 private:
  struct Work;
  int64_t split(int64_t grain, int threads, int* parts);

  std::vector<int64_t> begin_;   // rows' first positions in the flat range, and its end
  std::vector<double> partial_;  // leaves of the norm
  std::vector<double> scale_;    // by group
};

// The combination of formats among a kernel's loops, or -1. Kernels without state ignore what a form says of it.
int find_loop(const Kernel& kernel, const Form& form);
// The format of what is kept beside a weight, and of the moving average.
Format rest_format(Master master);
Format ema_format(Format param);
size_t size_of(Format format);
const char* name_of(Format format);
const char* name_of(Master master);  // "" for none

}  // namespace fusedopt
