// `_core.TorchPlan`: the parameters of a torch optimizer, remembered between steps. Each step reads the address, shape
// and format of every tensor anew, from the tensor, and compares the identity of the state and the groups' options with
// those of the last step. A replaced object that fits is adopted. Parameters for which anything no longer fits are
// reported as stale before the first write, and Python plans them again.
#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <map>
#include <string>
#include <unordered_map>

#include "bindings/arrays.h"
#include "bindings/bind.h"
#include "bindings/rows.h"
#include "bindings/torch_tensor.h"
#include "step/step.h"

namespace fusedopt {
namespace {

py::object interned(const py::handle& s) {
  PyObject* p = s.inc_ref().ptr();
  PyUnicode_InternInPlace(&p);
  return py::reinterpret_steal<py::object>(p);
}

// One hyperparameter of a kernel: group[key], or group[key][index], or the constant if the key is None or missing.
struct Source {
  py::object key;
  int index;
  double constant;
};

enum Kind { kIdle, kOurs, kForeign };  // no gradient so far; updated by the kernels; left to torch

// States, scales, residual, average, step, carry, sequence, steps and sums of rows.
constexpr int kEntries = 2 * kMaxStates + 7;

// The names of the state entries that a kernel uses: operands in the order of Parts, scales of quantised states, then
// step, carry, the number of the random sequence, the step counts and the sums of rows, as far as they exist.
struct Layout {
  std::vector<py::object> names;
  Parts parts = {};
  int scales = 0, step = -1, carry = -1, sequence = -1, row_steps = -1, row_sum = -1;  // after scales: positions
  int operands() const { return parts.count() - 2; }
};

struct Entry {
  py::object key, value;  // the objects in the dict
};

struct Param {
  py::object tensor;
  py::object state;  // the dict opt.state[p], or null
  const Layout* layout = nullptr;
  Entry entries[kEntries];              // in the order of the layout's names
  uint8_t order[kEntries] = {};         // their positions, in the order of the dict
  const void* last[1 + kEntries] = {};  // their addresses in the last step: compared, never dereferenced
  Format formats[kOperands] = {};       // of the operands in the last step
  int64_t done = 0;                     // steps so far, where there is no step tensor
  int64_t sequence = 0;
  bool sparse = false;  // the gradient is sparse, with one sparse dimension
  Kind kind = kIdle;
  bool known = false;  // whether formats is set

  bool by_rows() const { return sparse || layout->row_sum >= 0; }
  int n_entries() const { return layout ? int(layout->names.size()) : 0; }
  PyObject* entry(int i) const { return i < 0 ? nullptr : entries[i].value.ptr(); }
  PyObject* operand(int k) const { return k == 0 ? tensor.ptr() : entry(k - 2); }  // not the gradient
};

struct TorchGroup {
  py::dict options;
  int kernel;
  std::vector<Source> hyper;
  Source l1, ema_decay, seed;
  Master master;
  bool noisy, noisy_state;
  bool odd = false;                                     // a beta is outside [0, 1): torch's own step updates the group
  std::vector<std::pair<py::object, bool>> truths;      // options whose truth chose the kernel
  std::vector<std::pair<py::object, py::object>> same;  // options that must be the very same object
  std::vector<Param> params;
  Form form = {kFormats, kFormats, kFormats, kNoMaster, false, false};  // of the last tensor,
  KernelId found = {0, -1};                                             // and its kernel
};

// Address ranges, sorted by their beginnings. They may overlap.
class Intervals {
 public:
  void clear() { all_.clear(); }
  bool empty() const { return all_.empty(); }
  void add(const Extent& e) {
    if (e.low != e.high) all_.emplace_back(e.low, e.high);
  }
  void sort() {
    std::sort(all_.begin(), all_.end());
    for (size_t i = 1; i < all_.size(); ++i) all_[i].second = std::max(all_[i].second, all_[i - 1].second);
  }
  bool meet(const Extent& e) const {
    const auto past =
        std::lower_bound(all_.begin(), all_.end(), std::make_pair(e.high, static_cast<const char*>(nullptr)));
    return e.low != e.high && past != all_.begin() && std::prev(past)->second > e.low;
  }
  // From the end of the last range that begins at or before an address to the next range. The address is in no range if
  // it is in this gap.
  std::pair<const char*, const char*> gap(const char* at) const {
    const auto next = std::partition_point(all_.begin(), all_.end(), [at](const auto& i) { return i.first <= at; });
    return {next == all_.begin() ? nullptr : std::prev(next)->second,
            next == all_.end() ? reinterpret_cast<const char*>(UINTPTR_MAX) : next->first};
  }

 private:
  std::vector<std::pair<const char*, const char*>> all_;
};

class Stale {};

class TorchPlan {
 public:
  // types: the exact types taken; dtypes: torch's dtypes in the order of Format; exchange=false does without DLPack's
  // exchange API, as a torch older than 2.10 has to.
  TorchPlan(py::dict state, py::tuple types, py::tuple dtypes, py::object is_neg, py::object bump, bool exchange)
      : state_(std::move(state)),
        dtypes_(std::move(dtypes)),
        is_neg_(std::move(is_neg)),
        bump_(std::move(bump)),
        layout_(TorchLayout::get(exchange)) {
    for (py::handle t : types) types_.push_back(py::reinterpret_borrow<py::object>(t));
    api_ = exchange ? exchange_api(types_.at(0)) : nullptr;
    PyObject* grad = _PyType_Lookup(reinterpret_cast<PyTypeObject*>(types_.at(0).ptr()), grad_.ptr());
    if (grad && Py_TYPE(grad) == &PyGetSetDescr_Type) getter_ = reinterpret_cast<PyGetSetDescrObject*>(grad)->d_getset;
  }

  // Adds a group with all its parameters, none of which has had a gradient. hyper: a source for each of the kernel's;
  // then for l1, ema_decay, seed. master, noisy, noisy_state: see Form.
  void add_group(py::dict options, int kernel, py::list hyper, py::list truths, py::list same, int master, bool noisy,
                 bool noisy_state) {
    TorchGroup g{std::move(options), kernel, {}, {}, {}, {}, Master(master), noisy, noisy_state, false, {}, {}, {}};
    for (py::handle h : hyper) {
      auto t = py::reinterpret_borrow<py::tuple>(h);
      g.hyper.push_back({t[0].is_none() ? py::none() : interned(t[0]), t[1].cast<int>(), t[2].cast<double>()});
    }
    for (Source* last : {&g.seed, &g.ema_decay, &g.l1}) {
      *last = std::move(g.hyper.back());
      g.hyper.pop_back();
    }
    for (py::handle key : truths) g.truths.emplace_back(interned(key), truth(g.options, key));
    for (py::handle key : same)
      g.same.emplace_back(interned(key), py::reinterpret_borrow<py::object>(get(g.options, key)));
    const py::object params = fast_sequence(get(g.options, params_));
    g.params.resize(size_t(PySequence_Fast_GET_SIZE(params.ptr())));
    for (size_t i = 0; i < g.params.size(); ++i)
      g.params[i].tensor = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(params.ptr(), py::ssize_t(i)));
    for (const Source& source : g.hyper) g.odd |= odd(source, value(g.options, source));
    groups_.push_back(std::move(g));
  }

  // Adds the names of the state entries that a kernel uses; returns the number of the layout.
  int add_layout(py::list states, py::list scales, py::object residual, py::object ema, py::object step,
                 py::object carry, py::object sequence, py::object row_steps, py::object row_sum) {
    Layout l;
    auto add = [&](py::handle name) {
      l.names.push_back(interned(name));
      return int(l.names.size()) - 1;
    };
    for (py::handle name : states) add(name);
    l.parts = {int(l.names.size()), !residual.is_none(), !ema.is_none()};
    if (l.parts.residual) add(residual);
    if (l.parts.ema) add(ema);
    for (py::handle name : scales) add(name);
    l.scales = int(py::len(scales));
    if (!step.is_none()) l.step = add(step);
    if (!carry.is_none()) l.carry = add(carry);
    if (!sequence.is_none()) l.sequence = add(sequence);
    if (!row_steps.is_none()) l.row_steps = add(row_steps);
    if (!row_sum.is_none()) l.row_sum = add(row_sum);
    if (l.names.size() > size_t(kEntries)) throw py::value_error("state: too many names");
    layouts_known_.push_back(std::move(l));
    return int(layouts_known_.size()) - 1;
  }

  // Lets the kernels update a parameter whose state has this layout; `done`: see Param. Returns false if the state
  // lacks a name.
  bool set_param(int group, int index, int layout, py::object state, int64_t done, bool sparse) {
    Param& p = param(group, index);
    p.kind = kIdle;
    p.layout = &layouts_known_.at(size_t(layout));
    p.state = p.layout->names.empty() ? py::object() : std::move(state);
    p.done = done;
    p.sparse = sparse;
    p.known = false;
    std::fill(std::begin(p.last), std::end(p.last), nullptr);
    for (Entry& e : p.entries) e = {};
    if (!find_entries(p)) return false;
    p.kind = kOurs;
    return true;
  }

  // Leaves a parameter to torch.
  void leave_param(int group, int index) {
    Param& p = param(group, index);
    p.kind = kForeign;
    p.layout = nullptr;
    for (Entry& e : p.entries) e = {};
    followed_ = false;  // its state has to be looked up
    moved_ = true;      // the kernels no longer write its memory
  }

  // Whether the host's kernels take a parameter and its gradient as they are. If not, trouble() may give the reason.
  bool takes(py::handle tensor, py::handle grad) const {
    try {
      if (!exact(tensor.ptr()) || !exact(grad.ptr()) || negative(grad.ptr())) return false;
      const View a = written(tensor.ptr()), b = view(grad.ptr());
      return a.device == kHost && b.device == kHost && a.format < kFloats && b.format < kFloats && a.same_shape(b) &&
             (b.data || b.size() == 0) && aligned(b) && !meet(a, b);
    } catch (const Stale&) {
      return false;
    }
  }

  // Why the kernels cannot take a tensor of a type, dtype and device of ours as it is; "" where they can.
  std::string trouble(py::handle tensor, bool written) const {
    try {
      if (negative(tensor.ptr())) return "is a lazily negated view";
      const View v = view(tensor.ptr());
      if (!v.data && v.size() > 0) return "has no memory";
      if (!aligned(v)) return "is not aligned to its elements";
      return written && overlaps_itself(v) ? "has elements that share memory" : "";
    } catch (const Stale&) {
      return "cannot be read by way of DLPack";
    }
  }

  // Does the memory of two tensors meet, or interleave?
  bool meet(py::handle a, py::handle b) const { return meet(view(a.ptr()), view(b.ptr())); }

  // The outcome of a step. Unless it is kDone, nothing was written.
  enum Found { kDone, kAnew, kParams };  // else: build a new plan; plan stale() and conflicts() again

  // One step. Where all is on one device found_inf, grad_scale and the tensor for the norm may be there, too; else
  // they are None.
  int step(py::handle state, py::handle param_groups, double unscale, double max_norm, int threads,
           py::object found_inf, py::object grad_scale, py::object norm, py::object complete) {
    dropped_.clear();
    stale_.clear();
    conflicts_.clear();
    bool fits = true;
    try {
      look(state, param_groups);
    } catch (const Stale&) {
      fits = false;
    }
    if (!fits || !stale_.empty() || !conflicts_.empty()) {
      grads_.clear();
      return fits ? kParams : kAnew;
    }
    Scaling scaling{unscale, max_norm};
    if (!found_inf.is_none()) scaling.found_inf = scalar(found_inf.ptr());
    if (!grad_scale.is_none()) scaling.grad_scale = scalar(grad_scale.ptr());
    if (!norm.is_none()) scaling.norm = scalar(norm.ptr());
    CompleteSums complete_sums;
    if (!complete.is_none())
      complete_sums = [&](const std::vector<size_t>& tensors, double* rows) {
        const py::gil_scoped_acquire gil;
        py::list numbers;
        for (size_t r : tensors) numbers.append(r);
        complete(numbers,
                 py::memoryview::from_buffer(rows, {py::ssize_t(tensors.size()), py::ssize_t(kSumRow)},
                                             {py::ssize_t(kSumRow * sizeof(double)), py::ssize_t(sizeof(double))}));
      };
    try {
      py::gil_scoped_release nogil;
      norm_ = step_.run(scaling, Team::kTorch, threads, complete_sums);
    } catch (const BadIndex& e) {
      grads_.clear();
      const auto [group, number] = tables_[e.table];
      throw py::index_error("the gradient of parameter " + std::to_string(number) + " of group " +
                            std::to_string(group) + ": index " + std::to_string(e.position) +
                            ": expected a row in [0, " + std::to_string(lookups_[e.table]->rows) + "), got " +
                            std::to_string(e.index));
    }
    tell_autograd();
    grads_.clear();
    dropped_.clear();
    return kDone;
  }

  double norm() const { return norm_; }

  // Positions (group, index) of parameters that the last step found to have changed.
  py::list stale() const { return positions(stale_); }
  // Those whose memory or gradient overlaps another parameter or a state: torch has to update them, in order.
  py::list conflicts() const { return positions(conflicts_); }

  // Calls f for every reference to a Python object.
  template <class F>
  void each_reference(F&& f) {
    for (py::object* o : {static_cast<py::object*>(&state_), static_cast<py::object*>(&dtypes_), &is_neg_, &bump_})
      f(*o);
    for (py::object& t : types_) f(t);
    for (auto& [key, value] : entries_) f(key), f(value);
    for (Layout& l : layouts_known_)
      for (py::object& name : l.names) f(name);
    for (TorchGroup& g : groups_) {
      f(g.options);
      for (Source& s : g.hyper) f(s.key);
      for (Source* s : {&g.l1, &g.ema_decay, &g.seed}) f(s->key);
      for (auto& [key, was] : g.truths) f(key);
      for (auto& [key, was] : g.same) f(key), f(was);
      for (Param& p : g.params) {
        f(p.tensor);
        f(p.state);
        for (int i = 0; i < p.n_entries(); ++i) f(p.entries[i].key), f(p.entries[i].value);
      }
    }
    for (py::object& o : grads_) f(o);
    for (py::object& o : dropped_) f(o);
  }
  // For the garbage collector: releases all references. A later step returns kAnew.
  void let_go() {
    std::vector<py::object> all;
    each_reference([&](py::object& o) { all.push_back(std::move(o)); });
    groups_.clear();
    entries_.clear();
    types_.clear();
  }

 private:
  // While it lives Python collects no garbage: what a finalizer does could move a tensor that has been read.
  struct NoCollection {
    const int was = PyGC_Disable();
    ~NoCollection() {
      if (was) PyGC_Enable();
    }
  };

  static PyObject* find(const py::dict& d, py::handle key) {
    PyObject* v = PyDict_GetItemWithError(d.ptr(), key.ptr());
    if (!v && PyErr_Occurred()) throw py::error_already_set();
    return v;
  }
  static PyObject* get(const py::dict& d, py::handle key) {
    PyObject* v = find(d, key);
    if (!v) throw py::key_error(std::string(py::str(key)));
    return v;
  }
  static bool truth(const py::dict& d, py::handle key) {
    int t = PyObject_IsTrue(get(d, key));
    if (t < 0) throw py::error_already_set();
    return t != 0;
  }
  static double number(PyObject* o) {
    if (PyFloat_CheckExact(o)) return PyFloat_AS_DOUBLE(o);
    double x = PyFloat_AsDouble(o);  // tensors too
    if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
    return x;
  }
  bool exact(PyObject* o) const {
    for (const py::object& t : types_)
      if (reinterpret_cast<PyObject*>(Py_TYPE(o)) == t.ptr()) return true;
    return false;
  }
  bool negative(PyObject* o) const {
    if (layout_.known()) return layout_.negative(o);
    PyObject* args[] = {o};
    PyObject* r = PyObject_Vectorcall(is_neg_.ptr(), args, 1, nullptr);
    if (!r) throw py::error_already_set();
    bool yes = r == Py_True;
    Py_DECREF(r);
    return yes;
  }
  // tensor.grad, without looking the attribute up a thousand times.
  py::object grad_of(PyObject* o) const {
    PyObject* g = getter_ ? getter_->get(o, getter_->closure) : PyObject_GetAttr(o, grad_.ptr());
    if (!g) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(g);
  }
  // The same by Python's attributes: a microsecond instead of twenty nanoseconds.
  bool read_slowly(py::handle o, DLTensor* t) const {
    if (!o.attr("layout").equal(py::module_::import("torch").attr("strided"))) return false;
    const py::object place = o.attr("device");
    const auto type = place.attr("type").cast<std::string>();
    if (type != "cpu" && type != "cuda") return false;
    py::object dtype = o.attr("dtype");
    int format = 0;
    while (format < kFormats && !dtype.is(dtypes_[size_t(format)])) ++format;
    if (format == kFormats) return false;
    const auto shape = o.attr("shape").cast<std::vector<int64_t>>();
    const auto stride = o.attr("stride")().cast<std::vector<int64_t>>();
    layouts_read_.push_back(shape);
    layouts_read_.back().insert(layouts_read_.back().end(), stride.begin(), stride.end());
    int64_t* sizes = layouts_read_.back().data();
    *t = {reinterpret_cast<void*>(o.attr("data_ptr")().cast<uintptr_t>()),
          type == "cpu" ? kDLCpu : kDLCuda,
          type == "cpu" ? 0 : place.attr("index").cast<int32_t>(),
          int32_t(shape.size()),
          format == kBF16    ? kDLBfloat
          : format < kFloats ? kDLFloat
          : format == kU8    ? kDLUInt
                             : kDLInt,
          uint8_t(8 * size_of(Format(format))),
          1,
          sizes,
          sizes + shape.size(),
          0};
    return true;
  }
  bool read(PyObject* o, DLTensor* t) const {
    if (!api_) return read_slowly(o, t);
    if (api_->tensor_from_object(o, t) != 0) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
  View view_by_dlpack(PyObject* o) const {
    DLTensor t;
    Format f;
    int device;
    if (!read(o, &t) || !format_of(t, &f) || !device_of(t, &device)) throw Stale();
    return view_of(t, f, device);
  }
  // A tensor's memory, which lies within its storage; it may be null.
  View view(PyObject* o) const {
    View v;
    if (!direct_ || !layout_.read(o, &v)) v = view_by_dlpack(o);
    if (!v.data) return v;
    const Extent all = extent_of(v, false, 0, 0);
    const char* begin;
    size_t bytes;
    if (layout_.known()) {
      begin = layout_.data(o);
      bytes = layout_.bytes(o);
    } else {
      const py::object storage = py::handle(o).attr("untyped_storage")();
      begin = reinterpret_cast<const char*>(storage.attr("data_ptr")().cast<uintptr_t>());
      bytes = storage.attr("nbytes")().cast<size_t>();
    }
    if (all.low != all.high && (all.low < begin || all.high > begin + bytes))
      throw std::runtime_error("a tensor of shape " + shape_text(v) + " reaches beyond its storage of " +
                               std::to_string(bytes) + " bytes");
    return v;
  }
  static bool aligned(const View& v) { return reinterpret_cast<uintptr_t>(v.data) % size_of(v.format) == 0; }
  // What may be written: has memory, one place for each element, and no negative bit.
  View written(PyObject* o) const {
    if (!exact(o)) throw Stale();
    const View v = view(o);
    if (negative(o) || (!v.data && v.size() > 0) || !aligned(v) || overlaps_itself(v)) throw Stale();
    return v;
  }
  Scalar scalar(PyObject* o) const {
    View v = written(o);
    if (v.size() != 1 || (v.format != kF32 && v.format != kF64)) throw Stale();
    return {v.data, v.format == kF64, v.device};
  }
  // A learning rate that lies on a device, where steps there read it.
  bool rate_on_device(PyObject* o, Scalar* rate) const {
    if (PyFloat_CheckExact(o) || !open_device_library() || !exact(o)) return false;
    DLTensor t;
    Format format;
    int device;
    if (!read(o, &t) || !format_of(t, &format) || !device_of(t, &device)) return false;
    const View v = view_of(t, format, device);
    if (device < 0 || v.size() != 1 || (format != kF32 && format != kF64)) return false;
    *rate = {v.data, format == kF64, device};
    return true;
  }

  using Places = std::vector<std::pair<int, int>>;

  static py::list positions(const Places& places) {
    py::list out;
    for (const auto& [g, i] : places) out.append(py::make_tuple(g, i));
    return out;
  }
  Param& param(int group, int index) { return groups_.at(size_t(group)).params.at(size_t(index)); }
  static py::object fast_sequence(PyObject* o) {  // a list or tuple
    py::object s = py::reinterpret_steal<py::object>(PySequence_Fast(o, "expected a sequence"));
    if (!s) throw py::error_already_set();
    return s;
  }
  static bool meet(const View& a, const View& b) {
    const Extent x = extent_of(a, true, 0, 0), y = extent_of(b, true, 0, 1);
    return x.low < y.high && y.low < x.high;
  }

  // Finds parameters of the kernels that share memory with another parameter or state.
  void find_conflicts() {
    std::vector<Extent> extents;
    Places places;
    for (size_t g = 0; g < groups_.size(); ++g)
      for (size_t i = 0; i < groups_[g].params.size(); ++i) {
        Param& p = groups_[g].params[i];
        if (p.kind != kOurs) continue;
        const int row = int(places.size());
        places.emplace_back(int(g), int(i));
        try {
          add_written(p, row, extents);
        } catch (const Stale&) {  // it has no gradient in this step
          p.last[0] = nullptr;    // and is compared when it has one
        }
      }
    add_conflicts(extents, places);
    written_.clear();
    for (const Extent& e : extents) written_.add(e);
    written_.sort();
  }

  // Adds the memory of a parameter and its state.
  void add_written(const Param& p, int row, std::vector<Extent>& extents) const {
    extents.push_back(extent_of(view(p.tensor.ptr()), true, row, 0));
    for (int e = 0; e < p.n_entries(); ++e)
      if (e != p.layout->sequence) extents.push_back(extent_of(view(p.entry(e)), true, row, e));
  }
  void add_conflicts(std::vector<Extent>& extents, const Places& places) {
    for (auto& [a, b] : meetings(extents, 100000))
      for (int row : {a.row, b.row}) conflicts_.push_back(places[size_t(row)]);
  }

  // Finds gradients that overlap memory which the step writes. `written_` also has parameters without a gradient in
  // this step, possibly at old addresses, so a hit is checked against the parameters of this step.
  void find_read_conflicts() {
    bool meets = false;
    std::pair<const char*, const char*> gap = {nullptr, nullptr};  // the next gradient is often in the same gap
    for (const Extent& e : read_) {
      if (e.low == e.high || (gap.first <= e.low && e.high <= gap.second)) continue;
      gap = written_.gap(e.low);
      meets |= gap.first > e.low || e.high > gap.second;
    }
    if (!meets) return;
    std::vector<Extent> extents = read_;
    Places places;
    for (size_t g = 0; g < groups_.size(); ++g)
      for (size_t i = 0; i < groups_[g].params.size(); ++i) {
        const Param& p = groups_[g].params[i];
        if (places.size() == active_.size() || active_[places.size()] != &p) continue;
        add_written(p, int(places.size()), extents);
        places.emplace_back(int(g), int(i));
      }
    add_conflicts(extents, places);
    moved_ = true;  // the next step rebuilds written_
  }

  // Collects the memory that torch's own step reads and writes. Parameters of the kernels that overlap it have to be
  // updated by torch, too, in order.
  void find_foreign() {
    foreign_used_.clear();
    foreign_written_.clear();
    auto add = [&](PyObject* o, bool written) {
      if (!exact(o)) return;
      try {
        const Extent e = extent_of(view(o), written, 0, 0);
        foreign_used_.add(e);
        if (written) foreign_written_.add(e);
      } catch (const Stale&) {
      } catch (const std::runtime_error&) {  // it reaches beyond its storage, which torch reports
      }
    };
    for (const TorchGroup& group : groups_)
      for (const Param& p : group.params) {
        if (p.kind != kForeign) continue;
        const py::object grad = grad_of(p.tensor.ptr());
        if (grad.is_none()) continue;
        add(p.tensor.ptr(), true);
        add(grad.ptr(), false);
        if (!p.state || !PyDict_Check(p.state.ptr())) continue;
        PyObject *key, *held;
        Py_ssize_t at = 0;
        while (PyDict_Next(p.state.ptr(), &at, &key, &held)) add(held, true);
      }
    foreign_used_.sort();
    foreign_written_.sort();
  }

  // Everything a step needs to know, read and compared before the first write. Options come first: to read one may run
  // Python code, which may do anything to the tensors. From the first tensor's address to the start of the kernels
  // nothing else runs.
  void look(py::handle state, py::handle param_groups) {
    const py::object given = fast_sequence(param_groups.ptr());
    if (size_t(PySequence_Fast_GET_SIZE(given.ptr())) != groups_.size()) throw Stale();
    direct_ = layout_.known() && !serving(kDLCpu);
    step_.groups.resize(groups_.size());
    for (size_t g = 0; g < groups_.size(); ++g) {
      PyObject* options = PySequence_Fast_GET_ITEM(given.ptr(), py::ssize_t(g));
      if (options != groups_[g].options.ptr()) {
        if (!PyDict_Check(options)) throw Stale();
        replace(groups_[g].options, options);
      }
      read_options(g);
    }
    follow_state(state);
    while (!look_at_tensors()) {
    }
  }

  // Replaces a reference of the plan. The old object lives until the step no longer uses any address.
  template <class T>
  void replace(T& held, PyObject* by) {
    if (held) dropped_.push_back(std::move(held));
    held = py::reinterpret_borrow<T>(by);
  }

  void read_options(size_t g) {
    const TorchGroup& group = groups_[g];
    for (auto& [key, was] : group.truths)
      if (!find(group.options, key) || truth(group.options, key) != was) throw Stale();
    for (auto& [key, was] : group.same)
      if (find(group.options, key) != was.ptr()) throw Stale();
    Group& to = step_.groups[g];
    to.lr = {};
    to.hyper.resize(group.hyper.size());
    const Source& lr = group.hyper[0];
    PyObject* rate = lr.key.is_none() || lr.index >= 0 ? nullptr : find(group.options, lr.key);
    const bool far = rate && rate_on_device(rate, &to.lr);
    for (size_t h = far ? 1 : 0; h < group.hyper.size(); ++h) to.hyper[h] = value(group.options, group.hyper[h]);
    bool any_odd = false;
    for (size_t h = 1; h < group.hyper.size(); ++h) any_odd |= odd(group.hyper[h], to.hyper[h]);
    if (any_odd != group.odd) throw Stale();
    to.maximize = truth(group.options, maximize_);
    to.l1 = value(group.options, group.l1);
    to.ema_weight = 1 - value(group.options, group.ema_decay);
    to.seed = uint64_t(int64_t(value(group.options, group.seed)));
  }

  // False: an option had to be read on the way, so that it has to be called again.
  bool look_at_tensors() {
    const NoCollection guard;
    step_.clear();
    layouts_.clear();
    lookups_.clear();
    tables_.clear();
    layouts_read_.clear();
    grads_.clear();
    active_.clear();
    read_.clear();
    streams_.clear();
    stale_.clear();
    conflicts_.clear();
    if (any_foreign_) find_foreign();
    for (size_t g = 0; g < groups_.size(); ++g) {
      TorchGroup& group = groups_[g];
      const py::object params = fast_sequence(get(group.options, params_));
      if (size_t(PySequence_Fast_GET_SIZE(params.ptr())) != group.params.size()) throw Stale();
      for (size_t i = 0; i < group.params.size(); ++i) {
        Param& p = group.params[i];
        prefetch_ahead(group.params, i);
        if (PySequence_Fast_GET_ITEM(params.ptr(), py::ssize_t(i)) != p.tensor.ptr()) throw Stale();
        if (p.kind == kForeign) continue;
        const std::pair<int, int> place{int(g), int(i)};
        try {
          if (!look(p, place, group)) stale_.push_back(place);
        } catch (const Stale&) {
          stale_.push_back(place);
        }
      }
      Group& to = step_.groups[g];
      if (to.lr.at && !step_.all_on(to.lr.device, int(g))) {  // some tensors cannot read it there: wait for it
        to.lr = {};
        to.hyper[0] = value(group.options, group.hyper[0]);
        return false;
      }
    }
    find_odd_counts();
    if (moved_ && stale_.empty()) {
      find_conflicts();
      moved_ = false;
    }
    if (stale_.empty() && conflicts_.empty()) find_read_conflicts();
    return true;
  }

  // Step counts are integers; a parameter whose count is any other number is left to torch.
  void find_odd_counts() {
    auto odd = [](const Scalar& s) {
      const double t = s.get();
      return !(t >= 0 && t < 0x1p53 && t == double(int64_t(t)));
    };
    bool any = false;
    for (const std::vector<Tensor>* here : {&step_.host(), &step_.tables()})
      for (const Tensor& t : *here) any |= t.step.at && odd(t.step);
    for (size_t g = 0; any && g < groups_.size(); ++g)
      for (size_t i = 0; i < groups_[g].params.size(); ++i) {
        const Param& p = groups_[g].params[i];
        if (p.kind != kOurs || p.layout->step < 0 || grad_of(p.tensor.ptr()).is_none()) continue;
        if (std::find(active_.begin(), active_.end(), &p) == active_.end()) continue;
        const Scalar count = scalar(p.entry(p.layout->step));
        if (count.device == kHost && odd(count)) stale_.emplace_back(int(g), int(i));
      }
  }

  // Adopts the state dicts of the parameters if they are not those of the last step.
  void follow_state(py::handle state) {
    if (followed_ && same_state(state)) return;
    if (!PyDict_Check(state.ptr())) throw Stale();
    std::unordered_map<PyObject*, PyObject*> held;
    for (auto& [k, v] : entries_) {
      dropped_.push_back(std::move(k));
      dropped_.push_back(std::move(v));
    }
    entries_.clear();
    replace(state_, state.ptr());
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (PyDict_Next(state.ptr(), &at, &key, &value)) {
      entries_.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
      held[key] = value;
    }
    followed_ = true;
    any_foreign_ = false;
    for (TorchGroup& group : groups_)
      for (Param& p : group.params) {
        any_foreign_ |= p.kind == kForeign;
        const auto found = held.find(p.tensor.ptr());
        PyObject* its = found == held.end() ? nullptr : found->second;
        if (p.kind != kIdle && its != p.state.ptr()) replace(p.state, its);
      }
  }

  // Whether the optimizer's state holds the same dict objects as in the last step.
  bool same_state(py::handle state) const {
    if (state.ptr() != state_.ptr() || size_t(PyDict_GET_SIZE(state.ptr())) != entries_.size()) return false;
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (const auto& [k, v] : entries_)
      if (!PyDict_Next(state.ptr(), &at, &key, &value) || key != k.ptr() || value != v.ptr()) return false;
    return true;
  }

  // Compares a parameter's state with the last step, under the names of its layout; other entries are ignored. Replaced
  // entries are adopted, and checked with the rest. Returns false if a name is missing.
  bool follow_entries(Param& p) {
    const int n = p.n_entries();
    if (n == 0) return true;
    if (!p.state || !PyDict_Check(p.state.ptr())) return false;
    PyObject *key, *held;
    Py_ssize_t at = 0;
    int same = 0;
    while (same < n && PyDict_Next(p.state.ptr(), &at, &key, &held)) {
      const Entry& e = p.entries[p.order[same]];
      same += key == e.key.ptr() && held == e.value.ptr();
    }
    return same == n || find_entries(p);
  }
  bool find_entries(Param& p) {
    const Layout& layout = *p.layout;
    const int n = int(layout.names.size());
    if (n == 0) return true;
    if (!p.state || !PyDict_Check(p.state.ptr())) return false;
    PyObject *key, *held;
    Py_ssize_t at = 0;
    int found = 0;
    while (PyDict_Next(p.state.ptr(), &at, &key, &held)) {
      if (!PyUnicode_CheckExact(key)) continue;
      for (int i = 0; i < n; ++i) {
        PyObject* name = layout.names[size_t(i)].ptr();
        if (key != name && PyUnicode_Compare(key, name) != 0) continue;
        Entry& e = p.entries[i];
        if (e.key.ptr() != key) replace(e.key, key);
        if (e.value.ptr() != held) {
          replace(e.value, held);
          if (i == layout.sequence && !read_sequence(p, held)) return false;
        }
        p.order[found++] = uint8_t(i);
        break;
      }
    }
    return found == n;
  }
  static bool read_sequence(Param& p, PyObject* number) {
    if (!PyLong_Check(number)) return false;
    p.sequence = PyLong_AsLongLong(number);
    if (p.sequence == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }

  bool odd(const Source& s, double x) const { return s.key.is(betas_) && !(x >= 0 && x < 1); }
  double value(const py::dict& options, const Source& s) const {
    PyObject* o = s.key.is_none() ? nullptr : find(options, s.key);
    if (!o) return s.constant;
    if (s.index < 0) return number(o);
    if (PyTuple_CheckExact(o) && s.index < PyTuple_GET_SIZE(o)) return number(PyTuple_GET_ITEM(o, s.index));
    py::object item = py::reinterpret_steal<py::object>(PySequence_GetItem(o, s.index));
    if (!item) throw py::error_already_set();
    return number(item.ptr());
  }

  // Tensors are small objects scattered over memory, and a step over a thousand of them waits for little else. Each is
  // asked for in three stages, early enough for the stage before to have arrived. What is read on the way is read from
  // objects that the plan owns.
  static constexpr size_t kObjects = 24, kImpls = 16, kStorages = 8;  // parameters ahead

  template <class F>
  void each_tensor(const Param& p, F&& f) const {
    f(p.tensor.ptr());
    if (p.kind != kOurs) return;
    for (int k = 2; k < 2 + p.layout->operands(); ++k) f(p.operand(k));
    if (p.layout->step >= 0) f(p.entry(p.layout->step));
  }
  void prefetch_ahead(const std::vector<Param>& params, size_t i) const {
    if (!layout_.known()) return;
    if (i + 2 * kObjects < params.size())
      for (int n = 0; n <= int(sizeof(Param) / 64); ++n) prefetch(line(&params[i + 2 * kObjects], n));
    if (i + kObjects < params.size()) {
      const Param& p = params[i + kObjects];
      each_tensor(p, [](PyObject* t) { prefetch(t); });
      prefetch(p.state.ptr());
    }
    if (i + kImpls < params.size()) each_tensor(params[i + kImpls], [&](PyObject* t) { layout_.prefetch_impl(t); });
    if (i + kStorages < params.size()) {
      const Param& p = params[i + kStorages];
      layout_.prefetch_linked(p.tensor.ptr());
      each_tensor(p, [&](PyObject* t) { layout_.prefetch_storage(t); });
    }
  }

  // The indices of a sparse gradient, in place of which its values are left. The objects live as long as the step.
  IndexView indices_of(py::object& grad) {
    if (!grad.attr(is_sparse_).cast<bool>() || grad.attr("sparse_dim")().cast<int>() != 1) throw Stale();
    const py::object indices = grad.attr("_indices")();
    grad = grad.attr("_values")();
    grads_.push_back(indices);
    const auto item = indices.attr("element_size")().cast<int64_t>();
    const auto stride = indices.attr("stride")(1).cast<int64_t>();
    const auto n = indices.attr("shape")[py::int_(1)].cast<int64_t>();
    auto* data = reinterpret_cast<const char*>(indices.attr("data_ptr")().cast<uintptr_t>());
    const py::object storage = indices.attr("untyped_storage")();
    auto* begin = reinterpret_cast<const char*>(storage.attr("data_ptr")().cast<uintptr_t>());
    const auto bytes = storage.attr("nbytes")().cast<int64_t>();
    if ((item != 4 && item != 8) || !exact(grad.ptr()) || !exact(indices.ptr())) throw Stale();
    if (n > 0 && (stride < 0 || data < begin || data + ((n - 1) * stride + 1) * item > begin + bytes))
      throw std::runtime_error("the indices of a sparse gradient reach beyond their storage");
    return {data, item == 8, n, stride};
  }

  // Adds a parameter to the step if it has a gradient. Returns false if it has to be planned again.
  bool look(Param& p, std::pair<int, int> place, TorchGroup& group) {
    py::object grad = grad_of(p.tensor.ptr());
    if (grad.is_none()) return true;
    if (p.kind == kIdle || !exact(grad.ptr())) return false;
    IndexView indices{};  // without memory: of every row
    if (p.sparse) indices = indices_of(grad);
    if (negative(grad.ptr()) || !follow_entries(p)) return false;
    const Layout& layout = *p.layout;
    const Parts& parts = layout.parts;
    View v[kOperands];
    const int n = parts.count();
    for (int k = 0; k < n; ++k) {
      if (k == 1) {
        v[k] = view(grad.ptr());
        if ((!v[k].data && v[k].size() > 0) || !aligned(v[k])) return false;
      } else {
        v[k] = written(p.operand(k));
        note_memory(p, k == 0 ? 0 : k - 1, v[k].data);
        if (p.known && p.formats[k] != v[k].format) return false;
        p.formats[k] = v[k].format;
      }
      if ((!v[k].same_shape(v[0]) && !(p.sparse && k == 1)) || v[k].device != v[0].device) return false;
    }
    const View* states = v + 2;
    const Rule& rule = rule_of(group.kernel);
    for (int k = 0; k < parts.states; ++k)
      if (states[k].format != (layout.scales ? rule.codes[k] : states[0].format)) return false;
    if (parts.ema && v[n - 1].format != ema_format(v[0].format)) return false;
    float* scales[kMaxStates] = {};
    for (int k = 0; k < layout.scales; ++k) {
      const View scale = written(p.entry(layout.operands() + k));
      if (scale.format != kF32 || !scale.contiguous() || scale.size() != (v[0].size() + kBlock - 1) / kBlock ||
          scale.device != v[0].device)
        return false;
      scales[k] = reinterpret_cast<float*>(scale.data);
      note_memory(p, 1 + layout.operands() + k, scale.data);
    }
    Tensor tensor{};
    if (layout.step >= 0) tensor.step = scalar(p.entry(layout.step));
    if (layout.carry >= 0) tensor.carry = scalar(p.entry(layout.carry));
    for (const Scalar* s : {&tensor.step, &tensor.carry})
      if (s->at && s->device != v[0].device) return false;
    note_memory(p, 1 + layout.step, tensor.step.at);
    note_memory(p, 1 + layout.carry, tensor.carry.at);
    const Scalar row_steps = of_rows(p, layout.row_steps, v[0]), row_sum = of_rows(p, layout.row_sum, v[0]);
    if (row_steps.wide) return false;
    tensor.group = place.first;
    tensor.sequence = p.sequence;
    tensor.clock.t = p.done;
    tensor.done = &p.done;
    tensor.device_counts = true;
    const bool half = size_of(v[0].format) == 2;  // master and noisy are for these alone
    if ((half && group.master != kNoMaster) != parts.residual ||
        (parts.residual && v[2 + parts.states].format != residual_format(group.master)))
      return false;
    const Format state = layout.scales ? kI8 : parts.states ? v[2].format : v[0].format;
    const Form form{v[0].format,
                    v[1].format,
                    state,
                    half ? group.master : kNoMaster,
                    half && group.noisy,
                    state == kI8 || (size_of(state) == 2 && (group.noisy_state || !half))};
    if (!(form == group.form)) {  // tensors of a group mostly have the same form
      group.form = form;
      group.found = find_kernel(group.kernel, form);
    }
    tensor.kernel = group.found;
    if (tensor.kernel.form < 0 || meet(v[0], v[1])) return false;
    if (tensor.kernel.wide_grad && v[0].device != kHost) return false;
    if (!p.by_rows()) {
      lay_out(v, parts, tensor, layouts_);
    } else {
      if (!p.sparse && v[0].ndim > 0) indices.n = v[0].shape[0];
      int culprit;
      if (v[0].device != kHost || !lay_out_rows(v, parts, layout.scales, indices, tensor, lookups_, &culprit).empty())
        return false;
      lookups_.back()->steps = static_cast<float*>(row_steps.at);
      lookups_.back()->sum = row_sum;
      tables_.push_back(place);
    }
    for (int k = 0; k < layout.scales; ++k) tensor.span.scale[k] = scales[k];
    if (!foreign_used_.empty() && meets_foreign(v, n, tensor, layout, v[0].size())) conflicts_.push_back(place);
    if (v[0].device == kHost) {
      prefetch(tensor.step.at);
      step_.add(tensor);
    } else {
      const auto [at, fresh] = streams_.try_emplace(v[0].device, nullptr);
      bool known;
      if (fresh) at->second = stream_of(types_[0], v[0].device, &known);
      step_.add(tensor, v[0].device, nullptr, at->second);
    }
    read_.push_back(extent_of(v[1], false, int(active_.size()), 1));
    active_.push_back(&p);
    grads_.push_back(std::move(grad));
    p.known = true;
    return true;
  }

  // The entry with a number for each row of a table; no memory where there is no entry.
  Scalar of_rows(Param& p, int entry, const View& table) {
    if (entry < 0) return {};
    const View v = written(p.entry(entry));
    const bool wide = v.format == kF64;
    if ((!wide && v.format != kF32) || !v.contiguous() || table.ndim == 0 || v.size() != table.shape[0] ||
        v.device != table.device)
      throw Stale();
    note_memory(p, 1 + entry, v.data);
    return {v.data, wide, v.device};
  }

  void note_memory(Param& p, int slot, const void* at) {
    if (!at) return;
    moved_ |= at != p.last[slot];
    p.last[slot] = at;
  }

  bool meets_foreign(const View* v, int n, const Tensor& tensor, const Layout& layout, int64_t size) const {
    bool meets = false;
    for (int k = 0; k < n; ++k) {
      const Extent e = extent_of(v[k], k != 1, 0, k);
      meets |= (k == 1 ? foreign_written_ : foreign_used_).meet(e);
    }
    auto used = [&](const void* at, size_t bytes) {
      const char* low = static_cast<const char*>(at);
      meets |= at && foreign_used_.meet({low, low + bytes, true, 0, 0});
    };
    for (int k = 0; k < layout.scales; ++k)
      used(tensor.span.scale[k], size_t((size + kBlock - 1) / kBlock) * sizeof(float));
    for (const Scalar* s : {&tensor.step, &tensor.carry}) used(s->at, size_t(s->size()));
    if (tensor.rows) {
      used(tensor.rows->steps, size_t(tensor.rows->rows) * sizeof(float));
      used(tensor.rows->sum.at, size_t(tensor.rows->rows * tensor.rows->sum.size()));
    }
    return meets;
  }

  void tell_autograd() {
    constexpr size_t kAtATime = 16;
    const size_t n = active_.size();
    for (size_t i = 0; i < n; i += kAtATime) {
      const size_t next = std::min(i + kAtATime, n), after = std::min(next + kAtATime, n);
      if (layout_.known()) {
        for (size_t k = next; k < after; ++k) layout_.prefetch_linked(active_[k]->tensor.ptr());
        for (size_t k = after; k < std::min(after + kAtATime, n); ++k) layout_.prefetch_impl(active_[k]->tensor.ptr());
      }
      py::list changed(next - i);
      for (size_t k = i; k < next; ++k)
        PyList_SET_ITEM(changed.ptr(), py::ssize_t(k - i), active_[k]->tensor.inc_ref().ptr());
      bump_(changed);
    }
  }

  py::dict state_;
  py::tuple dtypes_;
  py::object is_neg_, bump_;
  std::vector<py::object> types_;
  const DLPackExchangeAPI* api_;
  const TorchLayout& layout_;
  bool direct_ = false;  // tensors in host memory are read by layout_, unless a device library serves them
  const PyGetSetDef* getter_ = nullptr;
  std::vector<std::pair<py::object, py::object>> entries_;
  std::deque<Layout> layouts_known_;
  std::vector<TorchGroup> groups_;
  py::object grad_ = interned(py::str("grad")), params_ = interned(py::str("params")),
             maximize_ = interned(py::str("maximize")), betas_ = interned(py::str("betas")),
             is_sparse_ = interned(py::str("is_sparse"));

  Step step_;
  Places stale_, conflicts_;
  bool followed_ = false;     // entries_ and the parameters' dicts match the state
  bool any_foreign_ = false;  // some parameter is left to torch
  bool moved_ = false;        // an address has changed since the last search for conflicts
  Intervals written_;         // the memory that kernels write, as of that search
  Intervals foreign_used_, foreign_written_;
  std::vector<py::object> dropped_;  // objects replaced since the last step
  std::vector<std::unique_ptr<Strided>> layouts_;
  std::vector<std::unique_ptr<Lookups>> lookups_;
  std::vector<std::pair<int, int>> tables_;  // of those with sparse gradients, in their order: group, number in it
  std::vector<py::object> grads_;
  std::vector<Param*> active_;                             // those with a gradient
  std::vector<Extent> read_;                               // their gradients, in the same order
  std::map<int, void*> streams_;                           // torch's, by device
  mutable std::deque<std::vector<int64_t>> layouts_read_;  // shapes and strides that no tensor lends
  double norm_ = -1;
};

// The plan of a Python object; nullptr before its constructor has run.
TorchPlan* plan_of(PyObject* self) {
  const auto held = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return held.holder_constructed() ? held.value_ptr<TorchPlan>() : nullptr;
}

// A parameter, a group, a state entry or a hook may refer back to the optimizer and so to the plan. The garbage
// collector therefore has to traverse the references of a plan.
void collect_garbage(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (TorchPlan* plan = plan_of(self)) {
      int stop = 0;
      plan->each_reference([&](py::object& o) {
        if (stop == 0 && o) stop = visit(o.ptr(), arg);
      });
      return stop;
    }
    return 0;
  };
  type->tp_clear = [](PyObject* self) {
    if (TorchPlan* plan = plan_of(self)) plan->let_go();
    return 0;
  };
}

}  // namespace

void bind_torch_plan(py::module_& m) {
  py::class_<TorchPlan>(m, "TorchPlan", py::custom_type_setup(collect_garbage),
                        "The parameters of a torch optimizer, remembered between steps.")
      .def(py::init<py::dict, py::tuple, py::tuple, py::object, py::object, bool>(), py::arg("state"), py::arg("types"),
           py::arg("dtypes"), py::arg("is_neg"), py::arg("bump"), py::arg("exchange"))
      .def("add_group", &TorchPlan::add_group, py::arg("options"), py::arg("kernel"), py::arg("hyper"),
           py::arg("truths"), py::arg("same"), py::arg("master"), py::arg("noisy"), py::arg("noisy_state"))
      .def("add_layout", &TorchPlan::add_layout, py::arg("states"), py::arg("scales"), py::arg("residual"),
           py::arg("ema"), py::arg("step"), py::arg("carry"), py::arg("sequence"), py::arg("row_steps"),
           py::arg("row_sum"))
      .def("set_param", &TorchPlan::set_param, py::arg("group"), py::arg("index"), py::arg("layout"), py::arg("state"),
           py::arg("done"), py::arg("sparse"))
      .def("leave_param", &TorchPlan::leave_param, py::arg("group"), py::arg("index"))
      .def("takes", &TorchPlan::takes, py::arg("tensor"), py::arg("grad"))
      .def("trouble", &TorchPlan::trouble, py::arg("tensor"), py::arg("written"))
      .def("meet", py::overload_cast<py::handle, py::handle>(&TorchPlan::meet, py::const_), py::arg("a"), py::arg("b"))
      .def_property_readonly("stale", &TorchPlan::stale)
      .def_property_readonly("conflicts", &TorchPlan::conflicts)
      .def("step", &TorchPlan::step, py::arg("state"), py::arg("param_groups"), py::arg("unscale"), py::arg("max_norm"),
           py::arg("threads"), py::arg("found_inf") = py::none(), py::arg("grad_scale") = py::none(),
           py::arg("norm") = py::none(), py::arg("complete") = py::none())
      .def_property_readonly("norm", &TorchPlan::norm);
}

}  // namespace fusedopt
