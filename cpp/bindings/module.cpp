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

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace py = pybind11;

namespace fusedopt {
namespace {

std::vector<std::string> split(const char* words) {
  std::istringstream in(words);
  std::vector<std::string> out;
  for (std::string w; in >> w;) out.push_back(w);
  return out;
}

// Of the built-in rules: name -> (number, hyperparameters, states, carries a scalar, dtype of each state's codes or "")
py::dict kernels() {
  py::dict d;
  for (int i = 0; i < library().n_rules; ++i) {
    const Rule& r = rule_of(i);
    py::list codes;
    for (int k = 0; k < r.n_states; ++k) codes.append(r.codes[k] == kNotQuantised ? "" : name_of(r.codes[k]));
    d[r.name] = py::make_tuple(i, py::tuple(py::cast(split(r.hyper))), py::tuple(py::cast(split(r.states))), r.carries,
                               py::tuple(codes));
  }
  return d;
}

// The forms of a rule: (param, grad, state, master, noisy, noisy_state): dtype names, "int8" for quantised states.
template <class Exists>
py::list formats_of(int rule, const Exists& exists) {
  int number;
  const KernelLibrary& l = library_of(rule, &number);
  py::list list;
  for (int i = 0; i < l.n_forms; ++i) {
    const Form& f = l.forms[i];
    if (exists(KernelId{rule, i}))
      list.append(py::make_tuple(name_of(f.param), name_of(f.grad), name_of(f.state), name_of(f.master), f.noisy,
                                 f.noisy_state));
  }
  return list;
}

// Of the built-in rules: name -> forms.
template <class Exists>
py::dict all_formats(const Exists& exists) {
  py::dict out;
  for (int r = 0; r < library().n_rules; ++r) out[rule_of(r).name] = formats_of(r, exists);
  return out;
}

// Asks the system for huge pages under new memory, as NumPy does for its arrays: rows scattered over a large table
// otherwise spend much of their time in page walks. `used`: the memory is in use, and its pages are to be joined now.
void use_huge_pages(uintptr_t at, size_t bytes, bool used) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (at + page - 1) / page * page, end = (at + bytes) / page * page;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1
  if (begin >= end) return;      // advisory: failure is ignored
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  if (used) madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#else
  (void)at, (void)bytes, (void)used;
#endif
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

PYBIND11_MODULE(_core_of_main_interpreter, m) {
  using namespace fusedopt;
  m.doc() = "The compiled core of fusedopt: fused update kernels over NumPy arrays and torch tensors.";
  m.attr("__version__") = FUSEDOPT_VERSION;
  m.def("kernels", &kernels,
        "Of the built-in rules: name -> (index, hyperparameter names, state names, carries a scalar, dtypes of the "
        "states' codes)");
  m.def(
      "formats", [] { return all_formats(exists); },
      "Built-in kernel -> the combinations that exist: (param, grad, state, master, noisy, noisy_state).");
  m.def(
      "formats_of", [](int kernel) { return formats_of(kernel, exists); }, py::arg("kernel"),
      "Those of one kernel, by its index.");
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
  m.def("use_huge_pages", &use_huge_pages, py::arg("at"), py::arg("bytes"), py::arg("used"),
        "Asks for huge pages under memory at this address, which is new or in use; does nothing outside of Linux.");
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
        return all_formats([&](KernelId id) { return device->kernels(id.rule)[id.form].prepare != nullptr; });
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
  bind_programs(m);
  bind_torch_plan(m);
}

// Before pybind11 runs: in a subinterpreter that shares the GIL it would wait for it forever.
extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
  if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
    PyErr_SetString(PyExc_ImportError, "fusedopt cannot be imported in a subinterpreter, only in the main interpreter");
    return nullptr;
  }
  return PyInit__core_of_main_interpreter();
}
