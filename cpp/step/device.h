// The tensors of a step that are on one device: describes them in the device's memory, where the description stays, and
// starts the kernels on a stream. What changes between steps (as a rule addresses of gradients) is sent; nothing is
// waited for.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "device/device.h"
#include "step/tensor.h"

namespace fusedopt {

// Says where the library is; "" for none. Nothing may be in use of the one before.
void set_device_library(const std::string& path);
// The library, opened if it has not been; nullptr and the reason where there is none to use.
const DeviceTable* device_library(std::string* why = nullptr);
// Why nothing runs on this device of the library's; empty where it does.
std::string device_trouble(int device);
// The library if it is open.
const DeviceTable* open_device_library();

// While a graph is captured on the stream what is launched there runs at each replay, and not before.
bool device_capturing(int device, void* stream);

// The device is out of memory, and no step has begun: once some is free the call can be repeated.
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

  // Starts one step. Throws DeviceOutOfMemory, or else std::runtime_error with the device's own message.
  void run(const std::vector<Group>& groups, const Scaling& scaling, void* stream);
  // Waits for what has been started on the stream.
  void wait(void* stream);
  // The norm of the gradients as they are. Waits for it.
  double norm(const std::vector<Group>& groups, void* stream);

 private:
  struct Launch {
    KernelId kernel;
    int64_t row, rows, chunk, chunks;
    bool plain;  // every row is: see DeviceKernel
  };
  static const DeviceKernel& kernel_of(const Launch& launch);
  void describe(const std::vector<Group>& groups, const Scaling& scaling);
  DeviceTables send(void* stream);
  char* allocate(size_t bytes) const;
  DeviceTables tables(char* memory) const;
  size_t done_at(size_t row) const;  // the word with a row's count of steps

  int device_;
  char* memory_ = nullptr;
  size_t bytes_ = 0;                     // of memory_
  std::vector<uint64_t> words_, there_;  // what the device should know; what it was sent last,
  bool known_ = false;                   // and whether that is so
  std::vector<size_t> order_;            // in which tensors are described: by kernel
  std::vector<Launch> launches_;
  size_t groups_at_ = 0, grads_at_ = 0, firsts_at_ = 0, rows_at_ = 0;  // in words,
  size_t described_ = 0;                                               // and their number
  int64_t chunks_ = 0;
};

}  // namespace fusedopt
