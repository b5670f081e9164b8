// One step over many tensors, wherever they are: the bindings fill it and call run(). It advances the clocks, clips by
// one norm over all devices, runs the host's tensors on threads and launches the kernels of the devices.
#pragma once
#include <map>
#include <utility>
#include <vector>

#include "step/device.h"
#include "step/host.h"

namespace fusedopt {

class Step {
 public:
  std::vector<Group> groups;

  // Removes all tensors. What devices remember of them is kept, for the next step over the same ones.
  void clear();
  // Adds a tensor of the host.
  void add(const Tensor& tensor) { host_.tensors.push_back(tensor); }
  // Adds a tensor of a device, to be updated on `stream`. Tensors of one device with different keys are described
  // apart.
  void add(const Tensor& tensor, int device, void* key, void* stream);
  // Before the step the host waits for what has been started on another stream of the device.
  void wait_for(int device, void* key, void* stream) { place(device, key).awaited.push_back(stream); }
  // After the step the host waits for it.
  void wait_at_end(int device, void* key) { place(device, key).wait = true; }

  const std::vector<Tensor>& host() const { return host_.tensors; }
  // Are all tensors of the group that was added last on this device?
  bool all_on(int device, int group) const;
  bool on_devices() const;

  // Returns the global norm of the unscaled gradients when it clips and has to know it, else -1: a norm that
  // scaling.norm receives stays on the device.
  double run(const Scaling& scaling, Team team, int threads);

 private:
  struct Place {
    DeviceStep step;
    void* stream = nullptr;
    std::vector<void*> awaited;
    bool wait = false;
    explicit Place(int device) : step(device) {}
  };
  Place& place(int device, void* key) { return places_.try_emplace({device, key}, device).first->second; }

  HostStep host_;
  std::map<std::pair<int, void*>, Place> places_;
};

}  // namespace fusedopt
