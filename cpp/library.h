// The border for kernels. A kernel library is one C table: rules, the forms in which tensors may be stored, and for
// each rule and form a kernel. There is one library for each instruction set within the module, one for CUDA in a file
// beside it, and any number may be added at run time. Nothing above the border knows which it calls. No code here.
#pragma once
#include "rules/types.h"

namespace fusedopt {

constexpr int64_t kNormBlock = 4096;  // elements under one leaf of the norm's tree, counted from the tensor's start

// A contiguous part of one tensor, all of whose operands are laid out alike.
struct Span {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  float* scale[kMaxStates];  // quantisation scales of the states: that of the block in which the span begins
  void* residual;            // or nullptr
  void* ema;                 // the moving average of the parameter, or nullptr
  int64_t n, first;          // length; position of its first element in the tensor
  uint32_t key;              // selects this tensor's random numbers in this step
};

// What follows the update while the span is in the cache: soft-thresholding by `shrink`, then ema += weight (p - ema).
struct Finish {
  double shrink, ema_weight;
};

// One rule in one form, on the host. Each function is passed `self`, so that a rule may be data instead of a type.
struct HostKernel {
  const void* self;
  // Computes the constants of a step into `prepared` (kPreparedBytes, aligned to 16); g is multiplied by `scale`.
  void (*prepare)(const void* self, const double* hyper, const Clock& clock, double scale, void* prepared);
  void (*update)(const void* self, const void* prepared, const Span& span);  // nullptr: the kernel does not exist
};

// One form on the host, whatever the rule. `n` numbers are of the type that rules compute in: double for kF64, else
// float. `codes` says how the states of a quantised form are coded.
struct HostForm {
  void (*finish)(const Finish& finish, const Span& span);
  void (*decode)(const Span& span, int n_states, const Format* codes, void* p, void* g, void* const* states);
  void (*encode)(const Span& span, int n_states, const Format* codes, const void* p, void* const* states);
};

struct HostTable {
  const HostKernel* const* kernels;  // of each rule, one for each form
  const HostForm* forms;
  double (*square_sum[kFloats])(const void* x, int64_t n);  // of up to kNormBlock elements, by format
};

struct DeviceTable;

struct KernelLibrary {
  const char* version;    // of fusedopt
  size_t size;            // of all that crosses the border: kHostSize or kDeviceSize, as compiled
  const char* processor;  // "avx2", "CUDA"
  const Rule* rules;
  int n_rules;
  const Form* forms;
  int n_forms;
  const HostTable* host;  // one of the two
  const DeviceTable* device;
};

constexpr size_t kHostSize = sizeof(KernelLibrary) + sizeof(Rule) + sizeof(Form) + sizeof(HostTable) +
                             sizeof(HostKernel) + sizeof(HostForm) + sizeof(Span) + sizeof(Finish) + sizeof(Clock);

}  // namespace fusedopt
