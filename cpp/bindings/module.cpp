// The module `fusedopt._core`: the registry, the choice of instruction set and threads. No arithmetic here.
#include <pybind11/stl.h>

#include <atomic>
#include <sstream>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bind.h"
#include "cpu/dispatch.h"
#include "rules/element.h"
#include "step/step.h"
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

// name -> (number, hyperparameters, states, carries a scalar)
py::dict kernels() {
  py::dict d;
  for (int i = 0; i < n_rules(); ++i) {
    const Rule& r = rule_of(i);
    d[r.name] = py::make_tuple(i, py::tuple(py::cast(split(r.hyper))), py::tuple(py::cast(split(r.states))), r.carries);
  }
  return d;
}

// rule -> list of (param, grad, state, master, noisy, noisy_state): dtype names, "int8" for quantised states.
template <class Exists>
py::dict formats_of(int rules, const Exists& exists) {
  py::dict out;
  for (int r = 0; r < rules; ++r) {
    int number;
    const KernelLibrary& l = library_of(r, &number);
    py::list list;
    for (int i = 0; i < l.n_forms; ++i) {
      const Form& f = l.forms[i];
      if (exists(KernelId{r, i}))
        list.append(py::make_tuple(name_of(f.param), name_of(f.grad), name_of(f.state), name_of(f.master), f.noisy,
                                   f.noisy_state));
    }
    out[rule_of(r).name] = list;
  }
  return out;
}

// The codes of a state of this name, in the rules that have one.
Format code_of(const std::string& state) {
  for (int r = 0; r < n_rules(); ++r) {
    const std::vector<std::string> states = split(rule_of(r).states);
    for (size_t k = 0; k < states.size(); ++k)
      if (states[k] == state) return rule_of(r).codes[k];
  }
  return kNotQuantised;
}

py::tuple isas() {
  py::list out;
  for (int i = 0; const char* name = usable_isa(i); ++i) out.append(name);
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
      "formats", [] { return formats_of(n_rules(), exists); },
      "kernel -> the combinations that exist: (param, grad, state, master, noisy, noisy_state).");
  m.attr("BLOCK") = kBlock;
  m.def(
      "masters",
      [] {
        py::dict masters;
        for (int i = kNoMaster + 1; i < kMasters; ++i)
          masters[name_of(Master(i))] = py::make_tuple(i, name_of(residual_format(Master(i))));
        return masters;
      },
      "Name of a master -> (its number, the dtype of the residual).");
  m.def(
      "code_of",
      [](const std::string& state) {
        const Format f = code_of(state);
        return f == kNotQuantised ? "" : name_of(f);
      },
      py::arg("state"), "The dtype of the codes of a state of this name; empty where it is not quantised.");
  m.def("isas", &isas, "Instruction sets this processor can run, best last.");
  m.def("isa", [] { return usable_isa(isa_in_use()); }, "The instruction set in use.");
  m.def(
      "use_isa", [](const char* name) { return use_isa(name); }, py::arg("name").none(true),
      "Forces an instruction set; None takes the best. False if it is not usable here.");
  m.def("default_threads", [] { return threads_or_default(0); }, "Threads of a step when nothing is set.");
  m.def("clip_factor", &clip_factor, py::arg("max_norm"), py::arg("norm"),
        "What gradients of this norm are multiplied by to clip them to max_norm.");
  m.def("torch_team", &torch_team, "What runs the steps beside torch: 'openmp', its own runtime, or 'pool', ours.");
  m.def("set_device_library", &set_device_library, py::arg("path"),
        "Says where the library of a device's kernels is; it is opened when it is needed.");
  m.def(
      "device_formats",
      [] {
        const DeviceTable* device = device_library();
        if (!device) throw py::value_error("there is no library to open");
        return formats_of(library().n_rules,
                          [&](KernelId id) { return device->kernels(id.rule)[id.form].prepare != nullptr; });
      },
      "As formats(), of the library that has been set.");
  m.def(
      "device_refusal",
      [](const std::string& type, int index) {
        std::string why;
        if (!serving(type == "cuda" ? kDLCuda : kDLCpu, &why))
          return why.empty() ? std::string("no device library serves it") : why;
        return index < 0 ? std::string() : device_trouble(index);
      },
      py::arg("type"), py::arg("index") = -1,
      "Why no device library serves tensors on 'cuda' or 'cpu', and on this device; empty if one does.");
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
