// A rule as data: what a user's own rule becomes. Numbers (what depends on the options and the step alone) are computed
// once a step, in double; instructions run over tiles of elements. One instruction is one loop, in which several
// operations are combined. Only the layout; interpret.cpp runs it, programs.cpp checks and registers it.
#pragma once
#include "library.h"

namespace fusedopt {

// An instruction reads up to four operands and writes one register. An operand is a vector, multiplied by a constant
// (by 1 where nothing is to be multiplied, which is exact), or a constant. The result is multiplied by one, too.
//
// A pair is   outer(x, k root?(inner(y, z)))   in which the operands are x, y, z in this order.
enum Inner : int { kSame, kAddVV, kAddVK, kMulVV, kDivVV, kDivKV, kDivVK, kInners };
enum Root : int { kNoRoot, kRootOfFirst, kRootOfResult, kRoots };  // of the operand y, of what inner gives
// "By" divides what inner gives by the operand.
enum Outer : int { kNoOuter, kPlusV, kPlusK, kTimesV, kOverV, kOverK, kByV, kByK, kOuters };
enum Compare : int { kLess, kLessEqual, kGreater, kGreaterEqual, kEqual, kNotEqual, kCompares };
enum Extreme : int { kMaximum, kMinimum, kExtremes };
enum Unary : int { kAbs, kSign, kExp, kLog, kUnaries };

// Where the codes of each kind begin.
constexpr int kPairs = 0;                                   // [inner][root][outer]
constexpr int kFmas = kPairs + kInners * kRoots * kOuters;  // [x is a root][y is constant][z is constant]
constexpr int kLerps = kFmas + 8;                           // [the weight is constant]
constexpr int kSelects = kLerps + 2;                        // compare(x, y) ? z : w, [compare][y, z, w are constant]
constexpr int kBounds = kSelects + kCompares * 8;           // [extreme][neither, y, x is constant]
constexpr int kUnary = kBounds + kExtremes * 3;
constexpr int kCodes = kUnary + kUnaries;

constexpr int kMaxNumbers = 192;       // hyperparameters, the clock, and what is computed from them
constexpr int kMaxInstructions = 128;  // of a code
constexpr int kMaxRegisters = 48;
constexpr int kMaxConditions = 4;
constexpr int kMaxConstants = 30;  // of a code, with the 1

struct Instruction {
  int16_t code, to;
  int16_t from[4];      // registers: 0 the parameter, 1 the gradient, then the states, then temporaries
  int16_t constant[5];  // places in the code's constants, of which 0 is 1: of each operand, then of the result
};

// What is done to the elements where the conditions have certain values.
struct Variant {
  const Instruction* instructions;
  int n_instructions, n_registers;
  const int16_t* constants;  // numbers; the first one stands for 1 and is not read
  const int8_t* signs;       // of the constants: 1 or -1
  int n_constants;
  int16_t results[kMaxSums];  // of a pass: the registers that are summed
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

// One number, from those before it.
struct Number {
  int16_t op, a, b, c;
  double literal;
};

// Numbers are counted: the hyperparameters, the step, the carried number, the tensor's length, its sums, then those of
// the list.
constexpr int kClockNumbers = 3 + kMaxSums;
struct Program {
  int n_hyper, n_states;
  const Number* numbers;
  int n_numbers;
  const int16_t* conditions;  // numbers whose truth selects a code; the first is the lowest bit
  int n_conditions;
  int n_passes;              // see Reduction
  int n_sums[kMaxSums];      // of each pass
  int8_t squares[kMaxSums];  // whether a sum is one of squares
  const Variant* variants;   // of each pass and of the update, one for each combination of the conditions
  const Number* carry;       // computes the carried number, the last of these, from the one of the step before
  int n_carry;
};

// The `self` of a user's kernel: a program in one form.
struct ProgramKernel {
  const Program* program;
  HostForm form;
  Format codes[kMaxStates];
  bool direct;  // all operands are stored as the numbers that rules compute with
  int size_param, size_grad, size_state, size_residual;  // bytes of an element
};

// The interpreter, compiled for one instruction set.
struct Interpreter {
  void (*advance)(const void* program, const double* hyper, Clock& clock);
  HostKernel wide, narrow;                     // for float64, and for all other forms; without `self`
  Reduction wide_reduction, narrow_reduction;  // without the number of passes and sums
};

}  // namespace fusedopt
