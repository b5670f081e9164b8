// The program of a user's rule. Its numbers depend on the options and the step alone and are computed once per step, in
// double; its instructions run over tiles of elements. One instruction is one loop that combines several operations.
// Declarations only: interpret.cpp runs a program, programs.cpp checks and registers it.
#pragma once
#include "library.h"

namespace fusedopt {

// An instruction reads up to four operands and writes one register. An operand is a constant, or a vector times a
// constant. The result is multiplied by a constant, too. The constant 1 stands for no factor; that product is exact.
//
// A pair computes   outer(x, k root?(inner(y, z)))   from the operands x, y, z, in this order.
enum Inner : int { kSame, kAddVV, kAddVK, kMulVV, kDivVV, kDivKV, kDivVK, kInners };
enum Root : int { kNoRoot, kRootOfFirst, kRootOfResult, kRoots };  // of the operand y, of the result of inner
// "By" divides the result of inner by the operand.
enum Outer : int { kNoOuter, kPlusV, kPlusK, kTimesV, kOverV, kOverK, kByV, kByK, kOuters };
enum Compare : int { kLess, kLessEqual, kGreater, kGreaterEqual, kEqual, kNotEqual, kCompares };
enum Extreme : int { kMaximum, kMinimum, kExtremes };
enum Unary : int { kAbs, kSign, kExp, kLog, kUnaries };

// The first code of each kind.
constexpr int kPairs = 0;                                        // [inner][root][outer]
constexpr int kFmas = kPairs + int(kInners) * kRoots * kOuters;  // [x is a root][y is constant][z is constant]
constexpr int kLerps = kFmas + 8;                                // [the weight is constant]
constexpr int kSelects = kLerps + 2;               // compare(x, y) ? z : w, [compare][y, z, w are constant]
constexpr int kBounds = kSelects + kCompares * 8;  // [extreme][neither, y, x is constant]
constexpr int kUnary = kBounds + kExtremes * 3;
constexpr int kCodes = kUnary + kUnaries;

constexpr int kMaxNumbers = 192;       // hyperparameters, the clock, and the results computed from them
constexpr int kMaxInstructions = 128;  // of a code
constexpr int kMaxRegisters = 48;
constexpr int kMaxConditions = 4;
constexpr int kMaxConstants = 30;  // of a code, with the 1

struct Instruction {
  int16_t code, to;
  int16_t from[4];      // registers: 0 the parameter, 1 the gradient, then the states, then temporaries
  int16_t constant[5];  // the factor of each operand, then of the result: indices of constants; number 0 is 1
};

// The operands of an instruction that are vectors: bit i for the operand i.
constexpr unsigned vectors_of(int code) {
  if (code < kFmas) {
    const int outer = code % kOuters, inner = code / (int(kOuters) * kRoots);
    const unsigned x = outer == kPlusV || outer == kTimesV || outer == kOverV || outer == kByV ? 1 : 0;
    const unsigned y = inner == kDivKV ? 0 : 2;
    return x | y | (inner == kSame || inner == kAddVK || inner == kDivVK ? 0 : 4);
  }
  if (code < kLerps) return 1 | ((code - kFmas) & 2 ? 0 : 2) | ((code - kFmas) & 1 ? 0 : 4);
  if (code < kSelects) return code == kLerps ? 7 : 3;
  if (code < kBounds) {
    const int constant = (code - kSelects) % 8;
    return 1 | (constant & 4 ? 0 : 2) | (constant & 2 ? 0 : 4) | (constant & 1 ? 0 : 8);
  }
  if (code < kUnary) return (code - kBounds) % 3 == 0 ? 3 : (code - kBounds) % 3 == 1 ? 1 : 2;
  return 1;
}

// The instructions for one combination of the values of the conditions.
struct Variant {
  const Instruction* instructions;
  int n_instructions, n_registers;
  const int16_t* constants;  // indices of numbers; the first constant is 1, and its index is not read
  const int8_t* signs;       // of the constants: 1 or -1
  int n_constants;
  int16_t results[kMaxSums];  // of a pass: the registers to sum
  unsigned needed;            // bit r: the parameter, the gradient or the state in register r is read
};

enum NumberOp : int {
  kLiteral,
  kAdd,
  kSubtract,
  kMultiply,
  kDivide,
  kPower,
  kNegative,
  kAbsolute,
  kSignOf,
  kSquareRoot,
  kExponential,
  kLogarithm,
  kMax,
  kMin,
  kFma,
  kLerp,
  kIs,
  kIsNot,
  kIsLess,
  kIsAtMost,
  kAnd,
  kOr,
  kNot,
  kChoose,
  kNumberOps
};

// Computes one number from earlier ones.
struct Number {
  int16_t op, a, b, c;
  double literal;
};

// The order of the numbers: hyperparameters, step, carried number, length of the tensor, its sums, then the list's.
constexpr int kClockNumbers = 3 + kMaxSums;
struct Program {
  int n_hyper, n_states;
  const Number* numbers;
  int n_numbers;
  const int16_t* conditions;  // indices of the numbers that select a variant; the first is the lowest bit
  int n_conditions;
  int n_passes;              // see Reduction
  int n_sums[kMaxSums];      // of each pass
  int8_t squares[kMaxSums];  // whether a sum is of squares
  const Variant* variants;   // for each pass and for the update: one per combination of the conditions
  const Number* carry;  // computes the carried number from that of the previous step; the last of these is the result
  int n_carry;
};

// The `self` of a user's kernel: a program in one form.
struct ProgramKernel {
  const Program* program;
  HostForm form;
  Format codes[kMaxStates];
  bool direct;                                           // all operands are stored in the type that rules compute with
  int size_param, size_grad, size_state, size_residual;  // bytes of an element
};

// The interpreter, compiled for one instruction set.
struct Interpreter {
  void (*advance)(const void* program, const double* hyper, Clock& clock);
  HostKernel wide, narrow;                     // for float64 and for all other forms; without `self`
  Reduction wide_reduction, narrow_reduction;  // without the numbers of passes and sums
};

}  // namespace fusedopt
