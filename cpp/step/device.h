// The tensors of a step that are on one device. Describes them in the device's memory, where the description is kept
// between steps, and launches the kernels on a stream. Only changes are uploaded (as a rule, addresses of gradients),
// and the host does not synchronise.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "device/device.h"
#include "step/tensor.h"

namespace fusedopt {

// Sets the library's path; "" for none. The previous library must not be in use.
void set_device_library(const std::string& path);
// Opens the library if necessary; nullptr and the reason if none can be used.
const DeviceTable* device_library(std::string* why = nullptr);
// Why no kernel can run on this device; empty if one can.
std::string device_trouble(int device);
// The library if it has been opened, else nullptr.
const DeviceTable* open_device_library();

// Whether a graph is being captured on the stream: launches then run at each replay, and not before.
bool device_capturing(int device, void* stream);

// The device is out of memory and no step has begun: the call can be repeated once memory is free.
struct DeviceOutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class DeviceStep {
 public:
  std::vector<Tensor> tensors;

  explicit DeviceStep(int device) : device_(device) {}
  DeviceStep(const DeviceStep&) = delete;
  DeviceStep& operator=(const DeviceStep&) = delete;
  ~DeviceStep();

  // Launches one step. Throws DeviceOutOfMemory, or std::runtime_error with the device's own message.
  void run(const std::vector<Group>& groups, const Scaling& scaling, void* stream);
  // Synchronises the stream.
  void wait(void* stream);
  // The norm of the gradients before unscaling. Synchronises.
  double norm(const std::vector<Group>& groups, void* stream);

 private:
  struct Launch {
    KernelId kernel;
    int64_t row, rows, chunk, chunks;
    bool plain;  // all rows are plain: see DeviceKernel
  };
  static const DeviceKernel& kernel_of(const Launch& launch);
  void describe(const std::vector<Group>& groups, const Scaling& scaling);
  DeviceTables send(void* stream);
  char* allocate(size_t bytes) const;
  DeviceTables tables(char* memory) const;
  size_t done_at(size_t row) const;  // index of the word with a row's step count

  int device_;
  char* memory_ = nullptr;
  size_t bytes_ = 0;                     // size of memory_
  std::vector<uint64_t> words_, there_;  // the current description; the last one uploaded,
  bool known_ = false;                   // and whether that is still valid
  std::vector<size_t> order_;            // of the tensors in the description: by kernel
  std::vector<Launch> launches_;
  size_t groups_at_ = 0, grads_at_ = 0, firsts_at_ = 0, rows_at_ = 0;  // where each table begins, in words,
  size_t described_ = 0;                                               // and the number of words
  int64_t chunks_ = 0;
};

}  // namespace fusedopt
