// The border to a kernel library of a device (CUDA's, or the simulated device of the tests): the description in the
// device's memory, in words of 8 bytes that the host compares with those of the last step, and a table of functions.
// Independent of Python, CUDA and arithmetic.
#pragma once
#include "library.h"

namespace fusedopt {

constexpr int kThreads = 256;      // per block
constexpr int64_t kChunk = 16384;  // elements per block of threads
static_assert(kChunk % (kThreads * 8) == 0, "the threads of a block take up to 8 elements each");
static_assert(kChunk % kNormBlock == 0 && kChunk % kBlock == 0,
              "leaves of the norm and blocks of codes lie in one chunk");

// One per step.
struct DeviceHead {
  const float* found_inf;   // on the device, or nullptr; if not 0, the step is skipped
  const float* grad_scale;  // on the device, or nullptr: gradients are divided by it
  double unscale;           // and multiplied by this
  double max_norm;          // 0: no clipping
  void* norm;               // on the device, or nullptr: receives the norm of the unscaled gradients
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
  uint64_t layout;  // 0: dense; else index of the words with dimensions, shape and each operand's strides, in the
                    // operands' order
  uint64_t group;
  uint64_t vector;  // whether every operand is aligned to 16 bytes
  void* step;       // on the device, or nullptr: `done` counts
  void* carry;
  uint64_t step_wide, carry_wide;
  int64_t done;      // owned by the device after the upload
  int64_t sequence;  // selects its random numbers
  uint64_t grad;     // format of the gradient
  int64_t place;     // position in the order of the norm
};

// Computed for each row by the kernel that precedes the update.
struct DeviceReady {
  alignas(16) char prepared[kPreparedBytes];
  double shrink, ema_weight;
  uint64_t key;
};

struct DeviceTables {
  const int64_t* words;  // everything that the host writes
  DeviceHead* head;
  const DeviceGroup* groups;
  const void* const* grads;  // by row
  const int64_t* firsts;     // by row: its first chunk
  DeviceRow* rows;
  DeviceReady* ready;
  double* chunk_sums;  // sums of squared gradients, by chunk
  double* row_sums;    // by place
  double* norm;        // before unscaling
};

// One rule in one form. Each function is passed `self`, and returns 0 or an error number for `message`.
struct DeviceKernel {
  const void* self;
  // nullptr: the kernel does not exist
  int (*prepare)(const void* self, const DeviceTables& t, int64_t first_row, int64_t rows, void* stream);
  int (*update)(const void* self, const DeviceTables& t, int64_t first_row, int64_t rows, int64_t first_chunk,
                int64_t chunks, void* stream);
  // The same for plain rows: aligned, dense, without l1 and moving average.
  int (*update_plain)(const void* self, const DeviceTables& t, int64_t first_row, int64_t rows, int64_t first_chunk,
                      int64_t chunks, void* stream);
  int (*load)(const void* self);  // loads every kernel, which is not allowed during capture
};

// The functions of a device's kernel library.
struct DeviceTable {
  const char* kind;
  int32_t device_type;                           // DLPack's, of the arrays that it serves
  bool streams;                                  // arrays have streams; else every call runs in order
  int out_of_memory;                             // the error number of exhausted memory
  const DeviceKernel* (*kernels)(int rule);      // by form
  int (*number)(const void* memory);             // the device of an address, -1 for the host; nullptr: use DLPack's
  int (*enter)(int device, bool* entered);       // makes it current unless it already is
  int (*leave)();                                // restores the previous one, without initialising it
  int (*ready)();                                // loads what a captured step may need
  int (*allocate)(size_t bytes, void** memory);  // also during capture
  int (*release)(void* memory);
  // Synchronous, in the order of the stream; `apart` from the stream during capture, to newly allocated memory.
  int (*upload)(void* to, const void* from, size_t bytes, void* stream, bool apart);
  int (*download)(void* to, const void* from, size_t bytes, void* stream);  // synchronous
  int (*patch)(uint64_t* to, const uint64_t* words, int64_t n,
               void* stream);  // passes the words by value, as arguments of a launch
  int (*norm)(const DeviceTables& t, int64_t rows, int64_t chunks, void* stream);
  int (*capturing)(void* stream, bool* yes);
  int (*synchronize)(void* stream);
  const char* (*message)(int error);
};

// Size of all types that cross the border to a device.
constexpr size_t kDeviceSize = sizeof(KernelLibrary) + sizeof(Rule) + sizeof(Form) + sizeof(DeviceTable) +
                               sizeof(DeviceKernel) + sizeof(DeviceHead) + sizeof(DeviceGroup) + sizeof(DeviceRow) +
                               sizeof(DeviceReady) + sizeof(DeviceTables);

}  // namespace fusedopt
