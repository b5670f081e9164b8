// One step over many tensors on host and devices. The bindings fill it and call run(), which advances the clocks, clips
// by one norm over all devices, updates the host's tensors and tables on threads and launches the kernels of each
// device.
#pragma once
#include <map>
#include <utility>
#include <vector>

#include "step/device.h"
#include "step/host.h"
#include "step/rows.h"

namespace fusedopt {

class Step {
 public:
  std::vector<Group> groups;

  // Removes all tensors. Descriptions on devices are kept for the next step over the same tensors.
  void clear();
  // Adds a tensor in the host's memory.
  void add(const Tensor& tensor) { (tensor.rows ? rows_.tensors : host_.tensors).push_back(tensor); }
  // Adds a tensor on a device, to be updated on `stream`. Tensors of one device with different keys have separate
  // descriptions.
  void add(const Tensor& tensor, int device, void* key, void* stream);
  // Makes the host wait for another stream of the device before the step.
  void wait_for(int device, void* key, void* stream) { place(device, key).awaited.push_back(stream); }
  // Makes the host wait for the step at its end.
  void wait_at_end(int device, void* key) { place(device, key).wait = true; }

  const std::vector<Tensor>& host() const { return host_.tensors; }
  const std::vector<Tensor>& tables() const { return rows_.tensors; }
  // Whether all tensors of the group added last are on this device.
  bool all_on(int device, int group) const;
  bool on_devices() const;

  // Returns the global norm of the unscaled gradients if it clips and the host knows the norm, else -1: a norm that is
  // written to scaling.norm stays on the device. Throws BadIndex, before anything is written, for an index that is no
  // row. With `complete` the sums over the host's tensors are completed after each pass; see host.h.
  double run(const Scaling& scaling, Team team, int threads, const CompleteSums& complete = nullptr);

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
  RowStep rows_;
  std::map<std::pair<int, void*>, Place> places_;
};

}  // namespace fusedopt
