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
class Ready {
 public:
  const HostKernel* kernel = nullptr;
  const HostForm* host_form = nullptr;
  const Form* form = nullptr;
  Format grad = kF32;
  int n_states = 0;
  const void* constants = nullptr;
  Finish finish = {};

  void resolve(KernelId id) {
    kernel = &host_kernel(id);
    host_form = &fusedopt::host_form(id);
    form = &form_of(id);
    grad = grad_format(id);
    const Rule& rule = rule_of(id.rule);
    n_states = rule.n_states;
    codes = rule.codes;
  }
  // Computes the constants of a step into `memory`, of kPreparedBytes. `sums`: over the tensor, kMaxSums of them and
  // then its length, where the rule has any.
  void prepare(const Tensor& tensor, const Group& group, double scale, const double* sums, void* memory) {
    if (const Reduction* r = kernel->reduction) {
      const int64_t length = sums ? int64_t(sums[kMaxSums]) : tensor.span.n;
      r->prepare(kernel->self, r->n_passes, group.hyper.data(), tensor.clock, scale, sums, length, memory);
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
  // `n` elements of a dense span, from `from` on.
  Span part(const Span& whole, int64_t from, int64_t n) const {
    Span s = whole;
    s.n = n;
    s.first += from;
    s.param = moved(whole.param, from, form->param);
    s.grad = moved(whole.grad, from, grad);
    for (int k = 0; k < n_states; ++k) {
      s.state[k] = moved(whole.state[k], from, form->state);
      if (whole.scale[k]) s.scale[k] = whole.scale[k] + from / kBlock;
    }
    if (whole.residual) s.residual = moved(whole.residual, from, residual_format(form->master));
    if (whole.ema) s.ema = moved(whole.ema, from, ema_format(form->param));
    return s;
  }
  void run(const Span& s) const {
    if (grad == form->grad) {
      kernel->update(kernel->self, constants, s);
    } else {
      in_float32(s, [&](const Span& tile) { kernel->update(kernel->self, constants, tile); }, true);
    }
    if (finish.shrink != 0 || s.ema) host_form->finish(finish, s);
  }
  // Adds a span to the sums of a pass.
  void add(const Span& s, double* lanes) const {
    auto sums = [&](const Span& x) { kernel->reduction->add(kernel->self, constants, x, lanes); };
    if (grad == form->grad) {
      sums(s);
    } else {
      in_float32(s, sums, false);
    }
  }

 private:
  // Decodes a span with a wide gradient a tile at a time and calls body(tile, with float32 operands); if `write`
  // encodes the result.
  template <class F>
  void in_float32(const Span& whole, F&& body, bool write) const {
    constexpr int64_t kTile = 512;  // elements; a multiple of kBlock and of kSumLanes
    alignas(64) float numbers[1 + kMaxStates][kTile];
    void* states[kMaxStates];
    for (int k = 0; k < n_states; ++k) states[k] = numbers[1 + k];
    const int n_coded = form->state == kF32 ? 0 : n_states;  // float32 states are updated in place
    for (int64_t from = 0; from < whole.n; from += kTile) {
      const Span stored = part(whole, from, whole.n - from < kTile ? whole.n - from : kTile);
      host_form->decode(stored, n_coded, codes, numbers[0], nullptr, states);
      Span tile{};
      tile.n = stored.n;
      tile.param = numbers[0];
      tile.grad = stored.grad;
      for (int k = 0; k < n_states; ++k) tile.state[k] = n_coded ? states[k] : stored.state[k];
      body(tile);
      if (write) host_form->encode(stored, n_coded, codes, numbers[0], states);
    }
  }

  const Format* codes = nullptr;
};

// Adds neighbouring pairs until one number is left: a reduction tree whose shape depends on n alone.
inline double tree_sum(double* x, int64_t n) {
  for (; n > 1; n = (n + 1) / 2)
    for (int64_t i = 0; i < n / 2 + n % 2; ++i) x[i] = 2 * i + 1 < n ? x[2 * i] + x[2 * i + 1] : x[2 * i];
  return n ? x[0] : 0;
}

}  // namespace fusedopt
