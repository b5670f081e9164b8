// The module `fusedopt._core`: the registry, the choice of instruction set and threads. No arithmetic here.
#include <pybind11/stl.h>

#include <atomic>
#include <sstream>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bind.h"
#include "cpu/dispatch.h"
#include "step/device_plan.h"
#include "step/plan.h"
#include "step/threads.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

std::vector<std::string> split(const char* words) {
  std::istringstream in(words);
  std::vector<std::string> out;
  for (std::string w; in >> w;) out.push_back(w);
  return out;
}

// name -> (index, hyperparameters, states, carries a scalar)
py::dict kernels() {
  py::dict d;
  const Table& t = table();
  for (int i = 0; i < t.n_kernels; ++i) {
    const Kernel& k = t.kernels[i];
    d[k.name] = py::make_tuple(i, py::tuple(py::cast(split(k.hyper))), py::tuple(py::cast(split(k.states))), k.carries);
  }
  return d;
}

// kernel -> list of (param, grad, state, master, noisy, noisy_state): dtype names, "int8" for quantised states. `loops`
// gives a kernel's, those that do not exist among them.
template <class Loops>
py::dict formats_of(const Loops& loops) {
  py::dict out;
  const Table& t = table();
  for (int i = 0; i < t.n_kernels; ++i) {
    py::list forms;
    for (int l = 0; l < t.kernels[i].n_loops; ++l) {
      const auto& loop = loops(i)[l];
      const Form& f = loop.form;
      if (loop.prepare)
        forms.append(py::make_tuple(name_of(f.param), name_of(f.grad), name_of(f.state), name_of(f.master), f.noisy,
                                    f.noisy_state));
    }
    out[t.kernels[i].name] = forms;
  }
  return out;
}

py::tuple isas() {
  py::list out;
  for (int i = 0; const Table* t = usable_table(i); ++i) out.append(t->isa);
  return py::tuple(out);
}

}  // namespace

int threads_or_default(int threads) {
  static const int n = default_threads();
  return threads > 0 ? threads : n;
}

}  // namespace fusedopt

PYBIND11_MODULE(_core, m) {
  using namespace fusedopt;
  m.doc() = "The compiled core of fusedopt: fused update kernels over NumPy arrays and torch tensors.";
  m.attr("__version__") = FUSEDOPT_VERSION;
  m.def("kernels", &kernels, "name -> (index, hyperparameter names, state names, carries a scalar)");
  m.def(
      "formats", [] { return formats_of([](int kernel) { return table().kernels[kernel].loops; }); },
      "kernel -> the combinations that exist: (param, grad, state, master, noisy, noisy_state).");
  m.attr("BLOCK") = kBlock;
  m.def(
      "code_of",
      [](const std::string& state) {
        const Format f = code_of(state.c_str());
        return f == kFormats ? "" : name_of(f);
      },
      py::arg("state"), "The dtype of the codes of a state of this name; empty where it is not quantised.");
  m.def("isas", &isas, "Instruction sets this processor can run, best last.");
  m.def("isa", [] { return table().isa; }, "The instruction set in use.");
  m.def(
      "use_isa", [](const char* name) { return use_isa(name); }, py::arg("name").none(true),
      "Forces an instruction set; None takes the best. False if it is not usable here.");
  m.def("default_threads", [] { return threads_or_default(0); }, "Threads of a step when nothing is set.");
  m.def("torch_team", &torch_team, "What runs the steps beside torch: 'openmp', its own runtime, or 'pool', ours.");
  m.def("set_device_library", &set_device_library, py::arg("path"),
        "Says where the library of a device's kernels is; it is opened when it is needed.");
  m.def(
      "device_formats",
      [] {
        const DeviceLibrary* library = device_library();
        if (!library) throw py::value_error("there is no library to open");
        return formats_of([&](int kernel) { return library->loops(kernel); });
      },
      "As formats(), of the library that has been set.");
  m.def(
      "device_refusal",
      [](const std::string& type, int index) {
        std::string why;
        const DeviceLibrary* library = type == "cpu" ? open_device_library() : device_library(&why);
        if (!library || library->device_type != (type == "cpu" ? kDLCpu : kDLCuda))
          return why.empty() ? std::string("it is not served") : why;
        return index < 0 ? std::string() : device_trouble(index);
      },
      py::arg("type"), py::arg("index") = -1,
      "Why no kernels serve tensors on 'cuda'; empty where they do. 'cpu': the simulated device.");
  m.def(
      "device_capturing",
      [](py::handle type, int index) {
        bool known;
        return open_device_library() && device_capturing(index, stream_of(type, index, &known));
      },
      py::arg("type"), py::arg("index"), "Is a graph captured on the current stream of tensors of this type?");
  py::register_exception<DeviceOutOfMemory>(m, "DeviceOutOfMemoryError", PyExc_RuntimeError);
  bind_batch(m);
  bind_losses(m);
  bind_torch_plan(m);
}
