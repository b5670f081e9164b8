// See tensor.h.
#include "step/tensor.h"

namespace fusedopt {

void Tensor::advance(const Group& of) {
  if (step.at) clock.t = int64_t(step.get());
  if (carry.at) {
    clock.carry = carry.get();
    clock.single = !carry.wide;
  }
  const Rule& rule = rule_of(kernel.rule);
  rule.advance(rule.self, of.hyper.data(), clock);
  if (step.at) step.set(double(clock.t));
  if (carry.at) carry.set(clock.carry);
  if (done) *done = clock.t;
}

Format ema_format(Format param) { return param == kF64 ? kF64 : kF32; }

const char* name_of(Format f) {
  static const char* const names[] = {"float64", "float32", "bfloat16", "float16", "int16", "int8", "uint8"};
  return names[f];
}

const char* name_of(Master m) {
  static const char* const names[] = {"", "split16", "split8", "float32"};
  return names[m];
}

}  // namespace fusedopt
