// What the loops over the host's tensors share: a kernel that is ready for spans, and the reduction tree of a norm.
#pragma once
#include "rules/element.h"
#include "step/tensor.h"

namespace fusedopt {

inline char* moved(void* p, int64_t elements, Format f) {
  return static_cast<char*>(p) + elements * int64_t(size_of(f));
}
inline const char* moved(const void* p, int64_t elements, Format f) {
  return static_cast<const char*>(p) + elements * int64_t(size_of(f));
}

// A kernel of the instruction set in use, with the constants of a step.
struct Ready {
  const HostKernel* kernel = nullptr;
  const HostForm* host_form = nullptr;
  const Form* form = nullptr;
  int n_states = 0;
  const void* constants = nullptr;
  Finish finish = {};

  void resolve(KernelId id) {
    kernel = &host_kernel(id);
    host_form = &fusedopt::host_form(id);
    form = &form_of(id);
    n_states = rule_of(id.rule).n_states;
  }
  // Computes the constants of a step into `memory`, of kPreparedBytes. `sums`: over the tensor, where the rule has any.
  void prepare(const Tensor& tensor, const Group& group, double scale, const double* sums, void* memory) {
    if (const Reduction* r = kernel->reduction) {
      r->prepare(kernel->self, r->n_passes, group.hyper.data(), tensor.clock, scale, sums, tensor.span.n, memory);
    } else {
      kernel->prepare(kernel->self, group.hyper.data(), tensor.clock, scale, memory);
    }
    constants = memory;
    finish = {group.hyper[0] * group.l1, group.ema_weight};
  }
  // The key of the tensor's random numbers in this step.
  uint32_t key(const Tensor& tensor, const Group& group) const {
    return form->counts() ? noise_key(group.seed, tensor.clock.t, tensor.sequence) : 0;
  }
  // A span of a tensor or of a tile, without pointers.
  Span span(const Tensor& tensor, uint32_t key, int64_t first, int64_t n) const {
    Span s{};
    s.n = n;
    s.first = first;
    s.key = key;
    for (int k = 0; k < n_states; ++k)
      if (tensor.span.scale[k]) s.scale[k] = tensor.span.scale[k] + first / kBlock;
    return s;
  }
  bool finishes(const Tensor& tensor) const { return finish.shrink != 0 || tensor.span.ema; }
  void run(const Span& s) const {
    kernel->update(kernel->self, constants, s);
    if (finish.shrink != 0 || s.ema) host_form->finish(finish, s);
  }
};

// Adds neighbouring pairs until one number is left: a reduction tree whose shape depends on n alone.
inline double tree_sum(double* x, int64_t n) {
  for (; n > 1; n = (n + 1) / 2)
    for (int64_t i = 0; i < n / 2 + n % 2; ++i) x[i] = 2 * i + 1 < n ? x[2 * i] + x[2 * i + 1] : x[2 * i];
  return n ? x[0] : 0;
}

}  // namespace fusedopt
