// The table that every build of cpu.cpp exports, and the plain types that cross its border. No code here.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "network/network.h"
#include "rules/formats.h"
#include "rules/rules.h"

#define FUSEDOPT_CAT_(a, b) a##b
#define FUSEDOPT_CAT(a, b) FUSEDOPT_CAT_(a, b)

namespace fusedopt {

constexpr int kMaxHyper = 8;  // hyperparameters of a rule
constexpr int kMaxStates = 3;
constexpr size_t kPreparedBytes = 256;  // a rule with its constants, ready for a span
constexpr int64_t kNormBlock = 4096;    // elements under one leaf of the norm's tree, counted from the tensor's start

// One span of equally laid out operands.
struct Span {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  float* scale[kMaxStates];  // of quantised states: that of the block in which the span begins
  void* rest;                // what is kept beside the weight
  void* ema;                 // the weights' moving average, or nullptr
  int64_t n, first;          // length; the place of its first element in the tensor
  uint32_t key;              // of this tensor's random numbers in this step
};

// A combination of formats. state: kI8 for every block-quantised one.
struct Form {
  Format param, grad, state;
  Master master;
  bool noisy, noisy_state;  // rounds stochastically

  bool operator==(const Form& o) const {
    return param == o.param && grad == o.grad && state == o.state && master == o.master && noisy == o.noisy &&
           noisy_state == o.noisy_state;
  }
};

// What follows the update while the span is in the cache: soft-thresholding by `shrink`, then ema += weight (p - ema).
struct Finish {
  double shrink, ema_weight;
};

// One rule in one combination of formats.
struct Loop {
  // Computes the constants of a step into `prepared` (kPreparedBytes, aligned to 16); g is multiplied by `scale`.
  // nullptr: the rule has a state that this combination cannot hold.
  void (*prepare)(const double* hyper, const Clock& clock, double scale, void* prepared);
  void (*sweep)(const void* prepared, const Span& span);
  void (*finish)(const Finish& finish, const Span& span);
  Form form;
  bool counts;  // elements: spans must begin at multiples of kBlock
};

struct Kernel {
  const char* name;
  const char* hyper;   // names, separated by blanks
  const char* states;  // likewise
  bool carries;
  void (*advance)(const double* hyper, Clock& clock);
  const Loop* loops;
  int n_loops;
  int n_states;
};

struct Table {
  const char* isa;
  const Kernel* kernels;
  int n_kernels;
  // The sum of squares of up to kNormBlock elements, by format.
  double (*square_sum[kFloats])(const void* x, int64_t n);
  const NetworkTable* network;
};

const Table* table_baseline();
const Table* table_avx2();
const Table* table_avx512();

}  // namespace fusedopt
