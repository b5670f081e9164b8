// What the binding files share.
#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {

class Step;

void bind_batch(pybind11::module_& m);
void bind_losses(pybind11::module_& m);
void bind_programs(pybind11::module_& m);
void bind_torch_plan(pybind11::module_& m);

// The thread count of a step: the given one if positive, else the process's default.
int threads_or_default(int threads);

// The step of a `_core.Batch`, whose arrays have been checked for overlap. Throws TypeError for another object.
Step& checked_step(pybind11::handle batch);

}  // namespace fusedopt
