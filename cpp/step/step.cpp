// See step.h.
#include "step/step.h"

#include <math.h>

#include "cpu/float_mode.h"
#include "rules/element.h"

namespace fusedopt {

void Step::clear() {
  host_.tensors.clear();
  rows_.tensors.clear();
  for (auto& [key, place] : places_) {
    place.step.tensors.clear();
    place.awaited.clear();
    place.wait = false;
  }
}

void Step::add(const Tensor& tensor, int device, void* key, void* stream) {
  Place& p = place(device, key);
  p.stream = stream;
  p.step.tensors.push_back(tensor);
}

bool Step::all_on(int device, int group) const {
  for (const std::vector<Tensor>* here : {&host_.tensors, &rows_.tensors})
    if (!here->empty() && here->back().group == group) return false;
  for (const auto& [key, p] : places_)
    if (key.first != device && !p.step.tensors.empty() && p.step.tensors.back().group == group) return false;
  return true;
}

bool Step::on_devices() const {
  for (const auto& [key, p] : places_)
    if (!p.step.tensors.empty()) return true;
  return false;
}

double Step::run(const Scaling& whole, Team team, int threads, const CompleteSums& complete) {
  FloatMode mode;
  std::vector<Place*> devices;
  for (auto& [key, p] : places_)
    if (!p.step.tensors.empty()) devices.push_back(&p);
  Scaling scaling = whole;
  double norm = -1;
  for (Place* p : devices)
    for (void* stream : p->awaited) p->step.wait(stream);
  const bool tables = !rows_.tensors.empty();
  if (tables) rows_.group(team, threads);
  const bool left_to_device = devices.size() == 1 && host_.tensors.empty() && !tables && scaling.norm.at;
  if (scaling.max_norm > 0 && !left_to_device) {
    norm = host_.norm(team, threads);
    if (!devices.empty() || tables) {
      double squares = norm * norm;
      if (tables) {
        const double here = rows_.norm(team, threads);
        squares += here * here;
      }
      for (Place* p : devices) {
        const double there = p->step.norm(groups, p->stream);
        squares += there * there;
      }
      norm = sqrt(squares);
    }
    norm *= fabs(scaling.unscale);
    scaling.unscale *= clip_factor(scaling.max_norm, norm);
    scaling.max_norm = 0;
  }
  if (!host_.tensors.empty()) {
    host_.advance(groups);
    host_.update(groups, scaling.unscale, team, threads, complete);
  }
  if (tables) {
    rows_.advance(groups);
    rows_.update(groups, scaling.unscale, team, threads);
  }
  for (Place* p : devices) {
    p->step.run(groups, scaling, p->stream);
    if (p->wait) p->step.wait(p->stream);
  }
  return norm;
}

}  // namespace fusedopt
