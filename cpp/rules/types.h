// Plain types shared by rules and loops: formats, forms, clocks, the description of a rule, limits.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fusedopt {

enum Format : int { kF64, kF32, kBF16, kF16, kFloats, kI16 = kFloats, kI8, kU8, kFormats };
// The format of a quantised state's codes: with a sign, non-negative (second moments), or none is defined.
constexpr Format kSigned = kI8, kNonNegative = kU8, kNotQuantised = kFormats;
// The residual of a 16-bit weight: its low-order bits, or a float32 copy.
enum Master : int { kNoMaster, kSplit16, kSplit8, kFloat32, kMasters };
constexpr size_t size_of(Format f) { return f == kF64 ? 8 : f == kF32 ? 4 : f == kI8 || f == kU8 ? 1 : 2; }
constexpr Format residual_format(Master m) { return m == kSplit16 ? kI16 : m == kSplit8 ? kI8 : kF32; }

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
constexpr bool kLittleEndian = false;
#else
constexpr bool kLittleEndian = true;
#endif
constexpr int kBlock = 64;  // elements of a quantised state under one scale

// How the operands of a tensor are stored. state: kI8 for every block-quantised one.
struct Form {
  Format param, grad, state;
  Master master;
  bool noisy, noisy_state;  // rounds stochastically

  // Whether results depend on an element's position, so that spans must begin at multiples of kBlock.
  bool counts() const { return state == kI8 || master == kSplit8 || noisy || noisy_state; }
  constexpr bool operator==(const Form& o) const {
    return param == o.param && grad == o.grad && state == o.state && master == o.master && noisy == o.noisy &&
           noisy_state == o.noisy_state;
  }
};

// Steps done, and one number that a rule may carry from step to step: a product, in single or double precision.
struct Clock {
  int64_t t;
  double carry;
  bool single;
};

constexpr int kMaxHyper = 8;  // hyperparameters of a rule
constexpr int kMaxStates = 4;
constexpr size_t kPreparedBytes = 256;  // a rule with the constants of a step

// Description of a rule, and the function that advances its clock. `self` is passed to `advance`.
struct Rule {
  const char* name;
  const char* hyper;         // names of hyperparameters, separated by blanks
  const char* states;        // names of states, likewise
  Format codes[kMaxStates];  // dtype of each state's codes: kI8 signed, kU8 non-negative, kFormats if not quantisable
  int n_states;
  bool carries;  // a number from step to step: Clock::carry
  const void* self;
  void (*advance)(const void* self, const double* hyper, Clock& clock);
};

}  // namespace fusedopt
