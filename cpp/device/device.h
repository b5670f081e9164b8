// The border between this module and a library with the kernels of a device (CUDA's, or the one that the tests
// simulate): what lies in the device's memory, in words of 8 bytes that the host compares with those of the last step,
// and a table of functions. No Python, no CUDA and no arithmetic here.
#pragma once
#include "library.h"

namespace fusedopt {

constexpr int kThreads = 256;      // of a block
constexpr int64_t kChunk = 16384;  // elements that one block updates
static_assert(kChunk % (kThreads * 8) == 0, "the threads of a block take up to 8 elements each");
static_assert(kChunk % kNormBlock == 0 && kChunk % kBlock == 0,
              "leaves of the norm and blocks of codes lie in one chunk");

// Once in a step.
struct DeviceHead {
  const float* found_inf;   // on the device, or nullptr; not 0: nothing is updated
  const float* grad_scale;  // on the device, or nullptr: gradients are divided by it
  double unscale;           // and multiplied by this
  double max_norm;          // 0: no clipping
  void* norm;               // on the device, or nullptr: where the norm of the unscaled gradients goes
  uint64_t norm_wide;       // float64, else float32
};

struct DeviceGroup {
  double hyper[kMaxHyper];  // the learning rate first
  const void* lr;           // on the device, or nullptr
  uint64_t lr_wide, maximize;
  double l1, ema_weight;
  uint64_t seed;
};

struct DeviceRow {
  void* param;
  void* state[kMaxStates];
  float* scale[kMaxStates];
  void *residual, *ema;
  int64_t n;
  uint64_t layout;  // 0: dense; else at which word dimensions, shape, then each operand's strides in Row's order begin
  uint64_t group;
  uint64_t vector;  // every operand begins at a multiple of 16 bytes
  void* step;       // on the device, or nullptr: `done` counts
  void* carry;
  uint64_t step_wide, carry_wide;
  int64_t done;      // belongs to the device once it is there
  int64_t sequence;  // of its random numbers
  uint64_t grad;     // its Format
  int64_t place;     // its number in the order of the norm
};

// What the kernel that goes before the update computes for each row.
struct DeviceReady {
  alignas(16) char prepared[kPreparedBytes];
  double shrink, ema_weight;
  uint64_t key;
};

struct DeviceTables {
  const int64_t* words;  // all that the host writes
  DeviceHead* head;
  const DeviceGroup* groups;
  const void* const* grads;  // of each row
  const int64_t* firsts;     // of each row: its first chunk
  DeviceRow* rows;
  DeviceReady* ready;
  double* chunk_sums;  // squares of gradients,
  double* row_sums;    // by place
  double* norm;        // before unscaling
};

// One rule in one form. Each function is passed `self`, and returns 0 or an error for `message`.
struct DeviceKernel {
  const void* self;
  // nullptr: the kernel does not exist
  int (*prepare)(const void* self, const DeviceTables& t, int64_t first_row, int64_t rows, void* stream);
  int (*update)(const void* self, const DeviceTables& t, int64_t first_row, int64_t rows, int64_t first_chunk,
                int64_t chunks, void* stream);
  // The same for rows that are all aligned and dense, without l1 or a moving average of the weights.
  int (*update_plain)(const void* self, const DeviceTables& t, int64_t first_row, int64_t rows, int64_t first_chunk,
                      int64_t chunks, void* stream);
  int (*load)(const void* self);  // all of them, as a graph may not
};

// What a kernel library for a device has beside its description.
struct DeviceTable {
  const char* kind;
  int32_t device_type;                           // DLPack's
  int out_of_memory;                             // the error that says so
  const DeviceKernel* (*kernels)(int rule);      // one for each form
  int (*number)(const void* memory);             // the device that it lies on, -1 for the host; nullptr: as DLPack says
  int (*enter)(int device, bool* entered);       // makes it current, unless it is
  int (*leave)();                                // back to the one before, which need not have been in use
  int (*ready)();                                // loads what a graph may need
  int (*allocate)(size_t bytes, void** memory);  // while a graph is captured, too
  int (*release)(void* memory);
  // In the stream's order, and waits for it; `apart` from it, while a graph is captured, to memory that is new.
  int (*upload)(void* to, const void* from, size_t bytes, void* stream, bool apart);
  int (*download)(void* to, const void* from, size_t bytes, void* stream);     // and waits for it
  int (*patch)(uint64_t* to, const uint64_t* words, int64_t n, void* stream);  // carries the words by value
  int (*norm)(const DeviceTables& t, int64_t rows, int64_t chunks, void* stream);
  int (*capturing)(void* stream, bool* yes);
  int (*synchronize)(void* stream);
  const char* (*message)(int error);
};

// Of all that crosses the border to a device.
constexpr size_t kDeviceSize = sizeof(KernelLibrary) + sizeof(Rule) + sizeof(Form) + sizeof(DeviceTable) +
                               sizeof(DeviceKernel) + sizeof(DeviceHead) + sizeof(DeviceGroup) + sizeof(DeviceRow) +
                               sizeof(DeviceReady) + sizeof(DeviceTables);

}  // namespace fusedopt
