// `_core.Batch`: tensors given as arrays at each call. Everything is checked before the first write.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>

#include "bindings/arrays.h"
#include "bindings/bind.h"
#include "bindings/rows.h"
#include "step/step.h"

namespace fusedopt {
namespace {

// What a group has beyond its rule's own arrays, and how it rounds.
struct Extras {
  Master master = kNoMaster;
  bool noisy = false, noisy_state = false, quantised = false, ema = false, row_steps = false, row_sum = false;
  double l1 = 0, ema_weight = 0;
  uint64_t seed = 0;
  std::vector<int64_t> sequences;

  bool special() const { return quantised || master != kNoMaster; }
};

// A gradient that names rows.
struct Pair {
  py::object indices, values;
  static bool is(py::handle object) {
    static PyTypeObject* const type = reinterpret_cast<PyTypeObject*>(py::type::of<Pair>().release().ptr());
    return Py_TYPE(object.ptr()) == type;
  }
};

class Batch {
 public:
  void clear() {
    step_.clear();
    step_.groups.clear();
    group_of_.clear();
    sources_.clear();
    layouts_.clear();
    lookups_.clear();
    tables_.clear();
    keep_.clear();
    extents_.clear();
    foreign_.clear();
    on_host_ = on_devices_ = false;
  }

  // Checks and adds one group of tensors. names: param, grad, the kernel's states, then what is kept beside the weight
  // and its average if `extras` says so, the scale of each state if these are quantised, the carried scalar if any, the
  // step counts and the sums of rows if `extras` says so. An error speaks of names[k], followed by [labels[i]] where
  // labels are given, or by [i] if `numbered`. A gradient may be a Pair: indices of rows, and a row of values for each;
  // where names[1] is empty, an error calls them indices and values.
  void add(int kernel, std::vector<double> hyper, bool maximize, py::tuple names, py::object labels, py::list operands,
           const std::vector<int64_t>& steps, const Extras& extras, bool numbered) {
    const Rule& rule = rule_of(kernel);
    const int group = int(step_.groups.size());
    step_.groups.push_back({std::move(hyper), maximize, extras.l1, extras.ema_weight, extras.seed});
    const Parts parts{rule.n_states, extras.master != kNoMaster, extras.ema};
    const int alike = parts.count(), scales = alike;
    const int carry = alike + (extras.quantised ? rule.n_states : 0), row_steps = carry + (rule.carries ? 1 : 0);
    const int row_sum = row_steps + (extras.row_steps ? 1 : 0), n_operands = row_sum + (extras.row_sum ? 1 : 0);
    const size_t n = py::len(operands[0]);
    const int first = int(group_of_.size());
    sources_.push_back({std::move(names), std::move(labels), std::move(operands), numbered});
    const Source& source = sources_.back();
    auto where = [&](int operand, size_t i) { return source.name(operand, i); };
    for (int o = 0; o < n_operands; ++o)
      if (source.count(o) != n)
        throw py::value_error(source.name(o) + ": expected " + std::to_string(n) + " arrays, one for each of " +
                              source.name(0) + ", got " + std::to_string(source.count(o)));
    for (size_t i = 0; i < n; ++i) {
      View v[kOperands + kMaxStates + 3];
      IndexView indices{};
      const bool by_rows = source.by_rows(i);
      if (by_rows) {
        std::string why;
        bool type_error;
        if (!try_indices(source.array(kIndices, i), keep_, &indices, &why, &type_error))
          raise(where(kIndices, i) + ": " + why, type_error);
      }
      for (int o = 0; o < n_operands; ++o) {
        py::handle object = source.array(o, i);
        size_t kept = keep_.size();
        v[o] = view_of(object, keep_, [&] { return where(o, i); }, extras.special() && o >= 2 && o < alike);
        if (o != 1 && v[o].read_only) throw py::value_error(where(o, i) + ": the array is read-only");
        if (o != 1 && keep_.size() > kept) foreign_.push_back(py::reinterpret_borrow<py::object>(object));
        if (o < alike && !v[o].same_shape(v[0]) && !(o == 1 && by_rows))
          throw py::value_error(where(o, i) + ": expected shape " + shape_text(v[0]) + " like " + where(0, i) +
                                ", got " + shape_text(v[o]));
        if (v[o].device != v[0].device)
          throw py::value_error(where(o, i) + ": expected it on the same device as " + where(0, i));
        if (o != 1 && overlaps_itself(v[o]))
          throw py::value_error(where(o, i) + ": elements of the array overlap in memory");
      }
      Tensor tensor{};
      tensor.group = group;
      tensor.kernel = kernel_of(kernel, v, extras, [&](int o) { return where(o, i); });
      tensor.clock.t = steps.at(i) - 1;
      if (i < extras.sequences.size()) tensor.sequence = extras.sequences[i];
      if (parts.residual)
        expect(v[2 + rule.n_states], residual_format(extras.master), [&] { return where(2 + rule.n_states, i); });
      if (parts.ema) expect(v[alike - 1], ema_format(v[0].format), [&] { return where(alike - 1, i); });
      for (int s = 0; extras.quantised && s < rule.n_states; ++s) {
        const View& scale = v[scales + s];
        expect(scale, kF32, [&] { return where(scales + s, i); });
        if (!scale.contiguous() || scale.size() != (v[0].size() + kBlock - 1) / kBlock)
          throw py::value_error(where(scales + s, i) + ": expected one element for each block of " +
                                std::to_string(kBlock));
        tensor.span.scale[s] = reinterpret_cast<float*>(scale.data);
      }
      if (rule.carries) {
        const View& c = v[carry];
        if (c.format != kF64 || c.size() != 1) throw py::type_error(where(carry, i) + ": expected one float64 element");
        tensor.carry = {c.data, true, c.device};
      }
      for (int o = row_steps; o < n_operands; ++o) {
        const Format wanted = o == row_sum && v[0].format == kF64 ? kF64 : kF32;
        expect(v[o], wanted, [&] { return where(o, i); });
        if (v[0].ndim == 0 || !v[o].contiguous() || v[o].size() != v[0].shape[0])
          throw py::value_error(where(o, i) + ": expected a contiguous array of one number for each row of " +
                                where(0, i) + ", got shape " + shape_text(v[o]));
      }
      if (by_rows || extras.row_sum) {
        if (!by_rows) indices.n = v[1].ndim > 0 ? v[1].shape[0] : 0;
        int culprit;
        if (v[0].device != kHost) throw py::type_error(where(0, i) + ": updates by rows are for arrays on the CPU");
        const std::string why = lay_out_rows(v, parts, extras.quantised, indices, tensor, lookups_, &culprit);
        if (!why.empty()) throw py::value_error(where(culprit, i) + ": " + why);
        if (extras.row_steps) lookups_.back()->steps = reinterpret_cast<float*>(v[row_steps].data);
        if (extras.row_sum) lookups_.back()->sum = {v[row_sum].data, v[row_sum].format == kF64, kHost};
        const char *from = indices.data, *to = from + (indices.n - 1) * indices.step * (indices.wide ? 8 : 4);
        if (by_rows && indices.n > 0)
          extents_.push_back(
              {std::min(from, to), std::max(from, to) + (indices.wide ? 8 : 4), false, first + int(i), kIndices});
        tables_.push_back(first + int(i));
      } else {
        lay_out(v, parts, tensor, layouts_);
      }
      for (int o = 0; o < n_operands; ++o) extents_.push_back(extent_of(v[o], o != 1, first + int(i), o));
      group_of_.push_back(group);
      if (v[0].device == kHost) {
        step_.add(tensor);
        on_host_ = true;
      } else {
        if (kernel >= library().n_rules)
          throw py::type_error(where(0, i) + ": a rule of your own runs on the CPU only");
        add_on_device(tensor, v[0].device, source, n_operands, i);
        on_devices_ = true;
      }
    }
  }

  // Raises ValueError where what is written shares memory with anything else that was added.
  // grads=false looks past the gradients.
  void check(bool grads) {
    if (!grads)
      extents_.erase(std::remove_if(extents_.begin(), extents_.end(), [](const Extent& e) { return e.operand == 1; }),
                     extents_.end());
    layout_.clear();
    for (const Extent& e : extents_) {
      layout_.push_back(reinterpret_cast<intptr_t>(e.low));
      layout_.push_back(reinterpret_cast<intptr_t>(e.high));
      layout_.push_back(e.written);
    }
    for (const auto& s : layouts_) {
      layout_.insert(layout_.end(), s->shape, s->shape + s->ndim);
      for (int k = 0; k < s->n; ++k) layout_.insert(layout_.end(), s->stride[k], s->stride[k] + s->ndim);
    }
    if (layout_ == checked_) return;  // as in the last call
    checked_.clear();
    refuse_overlap();
    checked_ = layout_;
  }

  Step& checked_step() {
    check(true);
    return step_;
  }

  // One step over all that was added; the global gradient norm if max_norm > 0, else None.
  py::object run(double max_norm, int threads) {
    check(true);
    if (on_devices_ && max_norm > 0) throw py::value_error("max_norm: not for arrays on a device");
    if (on_devices_ && on_host_)
      throw py::value_error("some arrays are on the CPU, others on a device: update them apart");
    double norm;
    try {
      py::gil_scoped_release nogil;
      norm = step_.run({1, max_norm}, Team::kOurs, threads_or_default(threads));
    } catch (const BadIndex& e) {
      const Place at = place({nullptr, nullptr, false, tables_[e.table], kIndices});
      throw py::index_error(at.name() + "[" + std::to_string(e.position) + "]: expected a row in [0, " +
                            std::to_string(lookups_[e.table]->rows) + "), got " + std::to_string(e.index));
    }
    tell_autograd();
    return norm < 0 ? py::object(py::none()) : py::float_(norm);
  }

 private:
  static constexpr int kIndices = -1;  // in place of an operand's number

  struct Source;

  [[noreturn]] static void raise(const std::string& message, bool type_error) {
    if (type_error) throw py::type_error(message);
    throw py::value_error(message);
  }

  // The step runs on the stream of the parameters' library; it waits for the streams of other operands' libraries, and
  // where there are such, the host waits for it.
  void add_on_device(const Tensor& tensor, int device, const Source& source, int n_operands, size_t i) {
    bool known;
    void* const stream = stream_of(py::type::handle_of(source.array(0, i)), device, &known);
    step_.add(tensor, device, stream, stream);
    bool wait = !known;
    for (int o = 1; o < n_operands; ++o) {
      void* const its = stream_of(py::type::handle_of(source.array(o, i)), device, &known);
      wait |= !known || its != stream;
      if (its != stream) step_.wait_for(device, stream, its);
    }
    if (wait) step_.wait_at_end(device, stream);
  }

  // What a group's arrays are called, and the arrays themselves: a list for each operand.
  struct Source {
    py::tuple names;
    py::object labels;  // a sequence, or nothing
    py::list operands;
    bool numbered;

    size_t count(int operand) const { return size_t(PyList_GET_SIZE(PyList_GET_ITEM(operands.ptr(), operand))); }
    py::handle item(int operand, size_t i) const {
      return PyList_GET_ITEM(PyList_GET_ITEM(operands.ptr(), operand), py::ssize_t(i));
    }
    bool by_rows(size_t i) const { return Pair::is(item(1, i)); }
    py::handle array(int operand, size_t i) const {
      if (operand != kIndices && !(operand == 1 && by_rows(i))) return item(operand, i);
      const auto& pair = item(1, i).cast<const Pair&>();
      return operand == kIndices ? pair.indices : pair.values;
    }
    std::string name(int operand) const { return names[size_t(operand)].cast<std::string>(); }
    std::string name(int operand, size_t i) const {
      const std::string label = labels     ? "[" + std::string(py::str(labels[py::int_(i)])) + "]"
                                : numbered ? "[" + std::to_string(i) + "]"
                                           : "";
      if (operand != kIndices && !(operand == 1 && by_rows(i))) return name(operand) + label;
      const char* part = operand == kIndices ? "indices" : "values";
      return name(1).empty() ? part + label : name(1) + label + "." + part;
    }
  };
  struct Place {
    const Source& source;
    int operand;
    size_t index;
    std::string name() const { return source.name(operand, index); }
    py::object object() const { return py::reinterpret_borrow<py::object>(source.array(operand, index)); }
  };
  Place place(const Extent& e) const {
    int first = e.row;
    while (first > 0 && group_of_[size_t(first) - 1] == group_of_[size_t(e.row)]) --first;
    return {sources_[size_t(group_of_[size_t(e.row)])], e.operand, size_t(e.row - first)};
  }

  template <class Name>
  static void expect(const View& v, Format format, const Name& name) {
    if (v.format != format)
      throw py::type_error(name() + ": expected dtype " + name_of(format) + ", got " + name_of(v.format));
  }

  template <class Where>
  static KernelId kernel_of(int number, const View* v, const Extras& extras, const Where& where) {
    const Rule& rule = rule_of(number);
    const Format state = rule.n_states ? v[2].format : v[0].format;
    for (int o = 2; o < 2 + rule.n_states; ++o) {
      const Format expected = !extras.quantised ? state : rule.codes[o - 2];
      if (v[o].format != expected)
        throw py::type_error(where(o) + ": expected dtype " + name_of(expected) +
                             (extras.quantised ? "" : " like " + where(2)) + ", got " + name_of(v[o].format));
    }
    const Form form{v[0].format,   v[1].format,  extras.quantised ? kI8 : state,
                    extras.master, extras.noisy, extras.quantised || extras.noisy_state};
    const KernelId found = find_kernel(number, form);
    if (found.form >= 0 && !(found.wide_grad && v[0].device != kHost)) return found;
    // Name the operand that departs from what the others allow.
    std::string grads, states;
    int at;
    const KernelLibrary& l = library_of(number, &at);
    for (int i = 0; i < l.n_forms; ++i) {
      const Form& f = l.forms[i];
      if (!exists({number, i}) || f.param != v[0].format || f.master != form.master || f.noisy != form.noisy) continue;
      auto note = [](std::string& list, const char* s) {
        if (list.find(s) == std::string::npos) list += (list.empty() ? "" : " or ") + std::string(s);
      };
      note(grads, name_of(f.grad));
      if (v[0].device == kHost && size_of(f.param) == 2) note(grads, name_of(kF32));
      if (f.grad == v[1].format && f.noisy_state == form.noisy_state) note(states, name_of(f.state));
    }
    bool bad_grad = states.empty();
    throw py::type_error(where(bad_grad ? 1 : 2) + ": expected dtype " + (bad_grad ? grads : states) + " with " +
                         where(0) + " of " + name_of(v[0].format) +
                         (bad_grad ? "" : " and " + where(1) + " of " + name_of(v[1].format)) + ", got " +
                         name_of(v[bad_grad ? 1 : 2].format));
  }

  py::array as_numpy(const Place& place) {
    const py::object object = place.object();
    if (place.operand == kIndices) return py::module_::import("numpy").attr("asarray")(object);
    View v = view_of(object, keep_, [] { return std::string("array"); });
    std::vector<py::ssize_t> shape(v.shape, v.shape + v.ndim), strides;
    for (int d = 0; v.stride && d < v.ndim; ++d) strides.push_back(v.step(d) * py::ssize_t(size_of(v.format)));
    return py::array(py::dtype(size_of(v.format) == 2 ? "u2" : name_of(v.format)), shape, strides, v.data, object);
  }

  void refuse_overlap() {
    constexpr size_t kLimit = 1000000;
    auto pairs = meetings(extents_, kLimit);
    for (auto& [a, b] : pairs) {
      Place pa = place(a), pb = place(b);
      // Interleaved strided views may meet without sharing an element.
      if (pairs.size() < kLimit &&
          !py::module_::import("numpy").attr("shares_memory")(as_numpy(pa), as_numpy(pb)).cast<bool>())
        continue;
      bool swap = b.row < a.row || (b.row == a.row && b.operand < a.operand);
      throw py::value_error((swap ? pa : pb).name() + ": shares memory with " + (swap ? pb : pa).name());
    }
  }

  // A raw write does not tell autograd that a torch tensor has changed.
  void tell_autograd() {
    if (foreign_.empty()) return;
    py::object torch = py::module_::import("sys").attr("modules").attr("get")("torch");
    if (torch.is_none()) return;
    for (py::object& o : foreign_)
      if (py::isinstance(o, torch.attr("Tensor"))) torch.attr("autograd").attr("graph").attr("increment_version")(o);
  }

  Step step_;
  std::vector<int> group_of_;  // of each tensor that was added
  std::vector<Source> sources_;
  std::vector<std::unique_ptr<Strided>> layouts_;
  std::vector<std::unique_ptr<Lookups>> lookups_;
  std::vector<int> tables_;  // of those that are updated by rows, in their order: the tensor's number
  std::vector<py::object> keep_, foreign_;
  std::vector<Extent> extents_;
  std::vector<int64_t> layout_, checked_;  // where all operands lie: now, and when they were last found apart
  bool on_host_ = false, on_devices_ = false;
};

bool is_sequence(py::handle o) { return PyList_Check(o.ptr()) || PyTuple_Check(o.ptr()); }

// The arrays of an in-place function as the lists that Batch takes. `names` is a subsequence of `all_names`; arrays
// that it leaves out must be None.
py::list listed(const py::tuple& names, const py::tuple& all_names, const py::tuple& arrays, bool many) {
  py::list operands;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const py::handle array = arrays[i];
    auto raise = [&](const std::string& why) { throw py::type_error(all_names[i].cast<std::string>() + ": " + why); };
    if (operands.size() == names.size() || !names[operands.size()].equal(all_names[i])) {
      if (!array.is_none()) raise("not used with these options, expected None");
      continue;
    }
    if (array.is_none()) raise("expected an array with these options, got None");
    if (many && !is_sequence(array))
      raise("expected a sequence of arrays, as param is, got " +
            std::string(py::str(py::type::handle_of(array).attr("__name__"))));
    py::list list;
    if (many) {
      list = py::reinterpret_steal<py::list>(PySequence_List(array.ptr()));  // a copy
      if (!list) throw py::error_already_set();
    } else {
      list.append(array);
    }
    operands.append(std::move(list));
  }
  return operands;
}

int64_t step_count(py::handle value) {
  auto refuse = [&](const char* expected) { return std::string("step: expected ") + expected + ", got "; };
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) {
    PyErr_Clear();
    throw py::type_error(refuse("an integer") + std::string(py::repr(value)));
  }
  int overflow = 0;
  const int64_t count = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow < 0 || (overflow == 0 && count < 1))
    throw py::value_error(refuse("1 or more") + std::string(py::repr(value)));
  if (overflow > 0) throw py::value_error(refuse("9223372036854775807 or less") + std::string(py::repr(value)));
  return count;
}

std::vector<int64_t> step_counts(py::handle step, size_t n) {
  if (!is_sequence(step)) return std::vector<int64_t>(n, step_count(step));
  std::vector<int64_t> counts;
  for (py::handle value : step) counts.push_back(step_count(value));
  if (counts.size() != n)
    throw py::value_error("step: expected " + std::to_string(n) + " values, got " + std::to_string(counts.size()));
  return counts;
}

// The whole of an in-place function's call: one group. The batch is kept, so that its vectors are, too; a call within a
// call (from an array's own __dlpack__) takes another. Small arrays take no longer than the work before the kernel.
void update(int kernel, std::vector<double> hyper, bool maximize, py::tuple names, const py::tuple& all_names,
            const py::tuple& arrays, py::handle step, int threads, bool row_steps, bool row_sum) {
  thread_local Batch kept;
  thread_local bool taken = false;
  Batch other;
  struct Turn {
    const bool outer = !taken;
    Turn() { taken = true; }
    ~Turn() {
      if (outer) {
        kept.clear();
        taken = false;
      }
    }
  } turn;
  Batch& batch = turn.outer ? kept : other;
  Extras extras;
  extras.row_steps = row_steps;
  extras.row_sum = row_sum;
  const bool many = is_sequence(arrays[0]);
  py::list operands = listed(names, all_names, arrays, many);
  const size_t n = py::len(operands[0]);
  batch.add(kernel, std::move(hyper), maximize, std::move(names), {}, std::move(operands), step_counts(step, n), extras,
            many);
  batch.run(0, threads);
}

}  // namespace

Step& checked_step(py::handle batch) { return batch.cast<Batch&>().checked_step(); }

void bind_batch(py::module_& m) {
  py::class_<Extras>(m, "Extras", "What a group has beyond its rule's own arrays, and how it rounds.")
      .def(py::init([](int master, bool noisy, bool noisy_state, bool quantised, bool ema, double l1, double ema_weight,
                       uint64_t seed, std::vector<int64_t> sequences, bool row_steps, bool row_sum) {
             return Extras{Master(master), noisy, noisy_state,         quantised, ema, row_steps, row_sum, l1,
                           ema_weight,     seed,  std::move(sequences)};
           }),
           py::kw_only(), py::arg("master") = 0, py::arg("noisy") = false, py::arg("noisy_state") = false,
           py::arg("quantised") = false, py::arg("ema") = false, py::arg("l1") = 0.0, py::arg("ema_weight") = 0.0,
           py::arg("seed") = 0, py::arg("streams") = std::vector<int64_t>(), py::arg("row_steps") = false,
           py::arg("row_sum") = false);
  py::class_<Pair>(m, "Pair", "A gradient that names rows: their indices, and a row of values for each.")
      .def(py::init<py::object, py::object>(), py::arg("indices"), py::arg("values"));
  py::class_<Batch>(m, "Batch", "Tensors to be updated together, given as arrays.")
      .def(py::init<>())
      .def("clear", &Batch::clear)
      .def(
          "add",
          [](Batch& batch, int kernel, std::vector<double> hyper, bool maximize, py::tuple names, py::list labels,
             py::list operands, const std::vector<int64_t>& steps, const Extras& extras) {
            batch.add(kernel, std::move(hyper), maximize, std::move(names), std::move(labels), std::move(operands),
                      steps, extras, false);
          },
          py::arg("kernel"), py::arg("hyper"), py::arg("maximize"), py::arg("names"), py::arg("labels"),
          py::arg("operands"), py::arg("steps"), py::arg("extras") = Extras{})
      .def("check", &Batch::check, py::arg("grads"))
      .def("run", &Batch::run, py::arg("max_norm"), py::arg("threads"));
  m.def("update", &update, py::arg("kernel"), py::arg("hyper"), py::arg("maximize"), py::arg("names"),
        py::arg("all_names"), py::arg("arrays"), py::arg("step"), py::arg("threads"), py::arg("row_steps") = false,
        py::arg("row_sum") = false,
        "Updates the arrays of an in-place function, of which `names` are those that the kernel uses.");
}

}  // namespace fusedopt
