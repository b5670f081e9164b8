// The border for kernels. A kernel library is one C table: rules, the forms in which tensors may be stored, and a
// kernel for each rule and form. The module contains one library per instruction set; CUDA's is in a file of its own,
// and more can be added at run time. Code above the border does not depend on which one it calls. Declarations only.
#pragma once
#include "rules/types.h"

namespace fusedopt {

constexpr int64_t kNormBlock = 4096;  // elements per leaf of the norm's tree, counted from the start of the tensor

// A contiguous part of one tensor whose operands all have the same layout.
struct Span {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  float* scale[kMaxStates];  // quantisation scales of the states, from the block in which the span begins
  void* residual;            // or nullptr
  void* ema;                 // the moving average of the parameter, or nullptr
  int64_t n, first;          // length; position of the first element in the tensor
  uint32_t key;              // selects this tensor's random numbers in this step
};

// What follows the update while the span is in the cache: a soft threshold of `shrink`, then ema += weight (p - ema).
struct Finish {
  double shrink, ema_weight;
};

constexpr int kMaxSums = 4;    // over a tensor, that a rule needs
constexpr int kSumLanes = 16;  // partial sums, the same on every instruction set

// Sums over all elements of a tensor that a rule needs before it can update one. They are computed in passes that only
// read; a pass may use the sums of those before it.
struct Reduction {
  int n_passes;
  int n_sums[kMaxSums];  // of each pass
  // Computes the constants of a pass, or of the update after the last one, from the sums so far and the tensor's
  // length.
  void (*prepare)(const void* self, int pass, const double* hyper, const Clock& clock, double scale, const double* sums,
                  int64_t n, void* prepared);
  // Adds element i of a span to lane i % kSumLanes of each sum of a pass; `lanes` has kSumLanes numbers for each.
  void (*add)(const void* self, const void* prepared, const Span& span, double* lanes);
};

// One rule in one form, on the host. Each function is passed `self`, so a rule can be data instead of a type.
struct HostKernel {
  const void* self;
  // Computes the constants of a step into `prepared` (kPreparedBytes, aligned to 16); g is multiplied by `scale`.
  void (*prepare)(const void* self, const double* hyper, const Clock& clock, double scale, void* prepared);
  void (*update)(const void* self, const void* prepared, const Span& span);  // nullptr: the kernel does not exist
  const Reduction* reduction;  // nullptr for most rules; else its `prepare` takes the place of the one above
};

// One form on the host, for any rule. Numbers have the type that rules compute with: double for kF64, else float.
// `codes` are the formats of the codes of a quantised form's states. decode() leaves out operands that are nullptr.
struct HostForm {
  void (*finish)(const Finish& finish, const Span& span);
  void (*decode)(const Span& span, int n_states, const Format* codes, void* p, void* g, void* const* states);
  void (*encode)(const Span& span, int n_states, const Format* codes, const void* p, void* const* states);
};

struct HostTable {
  const HostKernel* const* kernels;  // by rule, then by form
  const HostForm* forms;
  double (*square_sum[kFloats])(const void* x, int64_t n);  // of up to kNormBlock elements, by format
};

struct DeviceTable;

struct KernelLibrary {
  const char* version;    // of fusedopt
  size_t size;            // of all types that cross the border: kHostSize or kDeviceSize, as compiled
  const char* processor;  // "avx2", "CUDA"
  const Rule* rules;
  int n_rules;
  const Form* forms;
  int n_forms;
  const HostTable* host;  // exactly one of the two is set
  const DeviceTable* device;
};

constexpr size_t kHostSize = sizeof(KernelLibrary) + sizeof(Rule) + sizeof(Form) + sizeof(HostTable) +
                             sizeof(HostKernel) + sizeof(HostForm) + sizeof(Reduction) + sizeof(Span) + sizeof(Finish) +
                             sizeof(Clock);

}  // namespace fusedopt
