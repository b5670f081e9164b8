// A step over the tensors of one device: describes them in the device's memory, where the description stays, and starts
// the kernels on a stream. What changes between steps (as a rule addresses of gradients) is sent; nothing is waited
// for.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "device/device.h"
#include "step/plan.h"

namespace fusedopt {

// Says where the library is; "" for none. Nothing may be in use of the one before.
void set_device_library(const std::string& path);
// The library, opened if it has not been; nullptr and the reason where there is none to use.
const DeviceLibrary* device_library(std::string* why = nullptr);
// Why nothing runs on this device of the library's; empty where it does.
std::string device_trouble(int device);
// The library if it is open.
const DeviceLibrary* open_device_library();

// While a graph is captured on the stream what is launched there runs at each replay, and not before.
bool device_capturing(int device, void* stream);

// The device is out of memory, and no step has begun: once some is free the call can be repeated.
struct DeviceOutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DeviceParam {
  Row row;                     // clock.t: steps done, where no tensor counts them
  void *step, *carry;          // one-element tensors on the device, or nullptr
  bool step_wide, carry_wide;  // float64, else float32
  bool counted;                // on the device: clock.t matters when the plan is new; else in every step
};

// As Scaling; what is not nullptr lies on the device.
struct DeviceScaling {
  double unscale = 1, max_norm = 0;
  const float *found_inf = nullptr, *grad_scale = nullptr;
  void* norm = nullptr;  // receives the norm if max_norm > 0
  bool norm_wide = false;
};

class DevicePlan {
 public:
  struct Rate {  // a learning rate on the device
    const void* at = nullptr;
    bool wide = false;
    int device = -1;
  };
  std::vector<DeviceParam> rows;
  std::vector<Group> groups;
  std::vector<Rate> rates;  // of groups

  explicit DevicePlan(int device) : device_(device) {}
  DevicePlan(const DevicePlan&) = delete;
  DevicePlan& operator=(const DevicePlan&) = delete;
  ~DevicePlan();

  // Starts one step. Throws DeviceOutOfMemory, or else std::runtime_error with the device's own message.
  void run(const DeviceScaling& scaling, void* stream);
  // Waits for what has been started on the stream.
  void wait(void* stream);
  // The norm of the gradients as they are. Waits for it.
  double norm(void* stream);

 private:
  struct Launch {
    int kernel, loop;
    int64_t row, rows, chunk, chunks;
  };
  void describe(const DeviceScaling& scaling);
  DeviceTables send(void* stream);
  char* allocate(size_t bytes) const;
  DeviceTables tables(char* memory) const;
  size_t done_at(size_t row) const;  // the word with a row's count of steps

  int device_;
  char* memory_ = nullptr;
  size_t bytes_ = 0;                     // of memory_
  std::vector<uint64_t> words_, there_;  // what the device should know; what it was sent last,
  bool known_ = false;                   // and whether that is so
  std::vector<size_t> order_;            // in which rows are described: by loop
  std::vector<Launch> launches_;
  size_t groups_at_ = 0, grads_at_ = 0, firsts_at_ = 0, rows_at_ = 0;  // in words,
  size_t described_ = 0;                                               // and their number
  int64_t chunks_ = 0;
};

}  // namespace fusedopt
