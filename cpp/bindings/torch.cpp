// `_core.TorchPlan`: the parameters of a torch optimizer, remembered between steps. Each step reads the address, shape
// and format of every tensor anew, from the tensor, and compares the identity of the state and the groups' options with
// what they were; what no longer fits is reported as stale before anything is written, and Python builds a new plan.
#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <map>
#include <string>

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

// One hyperparameter of a kernel: group[key], or group[key][index], or a constant where the key is None.
struct Source {
  py::object key;
  int index;
  double constant;
};

enum Kind { kOurs, kIdle, kForeign };  // updated here; without a gradient so far; left to torch

constexpr int kMaxValues = 16;  // entries of one parameter's state dict that can be watched

struct Param {
  py::object tensor;
  py::object state;                    // the dict opt.state[p], or None
  py::object values[kMaxValues];       // what that dict holds, in its order
  py::object operands[kOperands - 2];  // in the order of Parts
  py::object scales[kMaxStates];       // of quantised states
  py::object step, carry;              // 0-d tensors, or None
  const char* last[kOperands] = {};    // where the operands lay in the last step; only compared
  int64_t done = 0;                    // steps so far, where there is no step tensor
  Kind kind = kIdle;
  int n_values = 0, n_operands = 0, n_scales = 0;
  Parts parts = {};
  int64_t sequence = 0;
  bool sparse = false;  // the gradient is sparse, with one sparse dimension
};

struct TorchGroup {
  py::dict options;
  int kernel;
  std::vector<Source> hyper;
  Source l1, ema_decay, seed;
  Master master;
  bool noisy, noisy_state;
  std::vector<std::pair<py::object, bool>> truths;      // options whose truth chose the kernel
  std::vector<std::pair<py::object, py::object>> same;  // options that must be the very same object
  std::vector<Param> params;
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

  // hyper: a source for each of the kernel's; then for l1, ema_decay, seed. master, noisy, noisy_state: see Form.
  void add_group(py::dict options, int kernel, py::list hyper, py::list truths, py::list same, int master, bool noisy,
                 bool noisy_state) {
    TorchGroup g{std::move(options), kernel, {}, {}, {}, {}, Master(master), noisy, noisy_state, {}, {}, {}};
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
    groups_.push_back(std::move(g));
  }

  // Adds the next parameter of the last group. operands: the kernel's states, in its order.
  void add_param(py::object tensor, int kind, py::object state, py::list operands, py::object step, py::object carry,
                 int64_t done, py::object residual, py::object ema, py::list scales, int64_t sequence, bool sparse) {
    Param p;
    p.kind = Kind(kind);
    p.tensor = std::move(tensor);
    p.state = std::move(state);
    if (!p.state.is_none()) {
      if (py::len(p.state) > size_t(kMaxValues)) throw py::value_error("state: too many entries");
      for (auto item : py::reinterpret_borrow<py::dict>(p.state)) {
        p.values[p.n_values++] = py::reinterpret_borrow<py::object>(item.second);
      }
    }
    for (py::handle o : operands) p.operands[p.n_operands++] = py::reinterpret_borrow<py::object>(o);
    p.parts = {p.n_operands, !residual.is_none(), !ema.is_none()};
    if (p.parts.residual) p.operands[p.n_operands++] = std::move(residual);
    if (p.parts.ema) p.operands[p.n_operands++] = std::move(ema);
    for (py::handle s : scales) p.scales[p.n_scales++] = py::reinterpret_borrow<py::object>(s);
    p.sequence = sequence;
    p.sparse = sparse;
    if (!step.is_none()) p.step = std::move(step);
    if (!carry.is_none()) p.carry = std::move(carry);
    p.done = done;
    groups_.back().params.push_back(std::move(p));
  }

  // Call after the last add_param.
  void finish() {
    entries_.clear();
    for (auto item : state_)
      entries_.emplace_back(py::reinterpret_borrow<py::object>(item.first),
                            py::reinterpret_borrow<py::object>(item.second));
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
  bool meet(py::handle a, py::handle b) const {
    const Extent x = extent_of(view(a.ptr()), true, 0, 0), y = extent_of(view(b.ptr()), true, 0, 1);
    return x.low < y.high && y.low < x.high;
  }

  // One step. False: stale, nothing was touched. Where all is on one device found_inf, grad_scale and the tensor for
  // the norm may lie there, too; else they are None.
  bool step(py::handle state, py::list param_groups, double unscale, double max_norm, int threads, py::object found_inf,
            py::object grad_scale, py::object norm) {
    try {
      look(state, param_groups);
    } catch (const Stale&) {
      grads_.clear();
      return false;
    }
    Scaling scaling{unscale, max_norm};
    if (!found_inf.is_none()) scaling.found_inf = scalar(found_inf);
    if (!grad_scale.is_none()) scaling.grad_scale = scalar(grad_scale);
    if (!norm.is_none()) scaling.norm = scalar(norm);
    try {
      py::gil_scoped_release nogil;
      norm_ = step_.run(scaling, Team::kTorch, threads);
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
    return true;
  }

  double norm() const { return norm_; }

  // Positions (group, index) of parameters whose memory meets that of another's parameter or state.
  py::list conflicts() {
    py::list out;
    for (const auto& [g, i] : find_conflicts()) out.append(py::make_tuple(g, i));
    return out;
  }

 private:
  // While it lives Python collects no garbage: what a finalizer does could move a tensor that has been read.
  struct NoCollection {
    const int was = PyGC_Disable();
    ~NoCollection() {
      if (was) PyGC_Enable();
    }
  };

  static PyObject* get(const py::dict& d, py::handle key) {
    PyObject* v = PyDict_GetItemWithError(d.ptr(), key.ptr());
    if (!v) {
      if (PyErr_Occurred()) throw py::error_already_set();
      throw py::key_error(std::string(py::str(key)));
    }
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
  Scalar scalar(const py::object& o) const {
    View v = written(o.ptr());
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

  void add_extents(const Param& p, int row, std::vector<Extent>& extents) const {
    extents.push_back(extent_of(view(p.tensor.ptr()), true, row, 0));
    for (int k = 0; k < p.n_operands; ++k) extents.push_back(extent_of(view(p.operands[k].ptr()), true, row, 2 + k));
  }

  std::vector<std::pair<int, int>> find_conflicts() const {
    std::vector<Extent> extents;
    std::vector<std::pair<int, int>> places, found;
    for (size_t g = 0; g < groups_.size(); ++g)
      for (size_t i = 0; i < groups_[g].params.size(); ++i) {
        const Param& p = groups_[g].params[i];
        if (p.kind != kOurs) continue;
        places.emplace_back(int(g), int(i));
        add_extents(p, int(places.size()) - 1, extents);
      }
    for (auto& [a, b] : meetings(extents, 100000))
      for (int row : {a.row, b.row}) found.push_back(places[size_t(row)]);
    return found;
  }

  // Everything a step needs to know, read and compared before the first write. Options come first: to read one may run
  // Python code, which may do anything to the tensors. From the first tensor's address to the start of the kernels
  // nothing else runs.
  void look(py::handle state, const py::list& param_groups) {
    if (py::len(param_groups) != groups_.size()) throw Stale();
    direct_ = layout_.known() && !serving(kDLCpu);
    step_.groups.resize(groups_.size());
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (PyList_GET_ITEM(param_groups.ptr(), py::ssize_t(g)) != groups_[g].options.ptr()) throw Stale();
      read_options(g);
    }
    same_state(state);
    while (!look_at_tensors()) {
    }
  }

  void read_options(size_t g) {
    const TorchGroup& group = groups_[g];
    for (auto& [key, was] : group.truths)
      if (truth(group.options, key) != was) throw Stale();
    for (auto& [key, was] : group.same)
      if (get(group.options, key) != was.ptr()) throw Stale();
    Group& to = step_.groups[g];
    to.lr = {};
    to.hyper.resize(group.hyper.size());
    const Source& lr = group.hyper[0];
    const bool far = !lr.key.is_none() && lr.index < 0 && rate_on_device(get(group.options, lr.key), &to.lr);
    for (size_t h = far ? 1 : 0; h < group.hyper.size(); ++h) to.hyper[h] = value(group.options, group.hyper[h]);
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
    streams_.clear();
    bool moved = false;
    for (size_t g = 0; g < groups_.size(); ++g) {
      TorchGroup& group = groups_[g];
      PyObject* params = get(group.options, params_);
      if (!PyList_CheckExact(params) || size_t(PyList_GET_SIZE(params)) != group.params.size()) throw Stale();
      for (size_t i = 0; i < group.params.size(); ++i) {
        Param& p = group.params[i];
        prefetch_ahead(group.params, i);
        if (PyList_GET_ITEM(params, py::ssize_t(i)) != p.tensor.ptr()) throw Stale();
        if (p.kind != kForeign) moved |= look(p, int(g), group);
      }
      Group& to = step_.groups[g];
      if (to.lr.at && !step_.all_on(to.lr.device, int(g))) {  // some tensors cannot read it there: wait for it
        to.lr = {};
        to.hyper[0] = value(group.options, group.hyper[0]);
        return false;
      }
    }
    if (moved && !find_conflicts().empty()) throw Stale();
    return true;
  }

  // The optimizer's state dict holds the very objects that it held when the plan was made.
  void same_state(py::handle state) const {
    if (state.ptr() != state_.ptr() || size_t(PyDict_GET_SIZE(state.ptr())) != entries_.size()) throw Stale();
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (const auto& [k, v] : entries_)
      if (!PyDict_Next(state.ptr(), &at, &key, &value) || key != k.ptr() || value != v.ptr()) throw Stale();
  }

  double value(const py::dict& options, const Source& s) const {
    if (s.key.is_none()) return s.constant;
    PyObject* o = get(options, s.key);
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
    for (int k = 0; k < p.n_operands; ++k) f(p.operands[k].ptr());
    if (p.step) f(p.step.ptr());
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

  // True if an operand is not where it was in the last step.
  bool look(Param& p, int index, const TorchGroup& group) {
    py::object grad = grad_of(p.tensor.ptr());
    if (grad.is_none()) return false;
    if (p.kind == kIdle || !exact(grad.ptr())) throw Stale();
    IndexView indices{};
    if (p.sparse) indices = indices_of(grad);
    if (negative(grad.ptr())) throw Stale();
    if (!p.state.is_none()) {
      if (PyDict_GET_SIZE(p.state.ptr()) != p.n_values) throw Stale();
      PyObject *key, *held;
      Py_ssize_t at = 0;
      for (int k = 0; k < p.n_values; ++k)
        if (!PyDict_Next(p.state.ptr(), &at, &key, &held) || held != p.values[k].ptr()) throw Stale();
    }
    View v[kOperands];
    bool moved = false;
    const int n = 2 + p.n_operands;
    for (int k = 0; k < n; ++k) {
      if (k == 1) {
        v[k] = view(grad.ptr());
        if ((!v[k].data && v[k].size() > 0) || !aligned(v[k])) throw Stale();
      } else {
        v[k] = written(k == 0 ? p.tensor.ptr() : p.operands[k - 2].ptr());
        moved |= v[k].data != p.last[k];
        p.last[k] = v[k].data;
      }
      if ((!v[k].same_shape(v[0]) && !(p.sparse && k == 1)) || v[k].device != v[0].device) throw Stale();
    }
    const View* states = v + 2;
    for (int k = 0; k < p.parts.states; ++k)
      if (p.n_scales ? size_of(states[k].format) != 1 : states[k].format != states[0].format) throw Stale();
    if (p.parts.ema && v[n - 1].format != ema_format(v[0].format)) throw Stale();
    float* scales[kMaxStates] = {};
    for (int k = 0; k < p.n_scales; ++k) {
      const View scale = written(p.scales[k].ptr());
      if (scale.format != kF32 || !scale.contiguous() || scale.size() != (v[0].size() + kBlock - 1) / kBlock ||
          scale.device != v[0].device)
        throw Stale();
      scales[k] = reinterpret_cast<float*>(scale.data);
    }
    Tensor tensor{};
    if (p.step) tensor.step = scalar(p.step);
    if (p.carry) tensor.carry = scalar(p.carry);
    for (const Scalar* s : {&tensor.step, &tensor.carry})
      if (s->at && s->device != v[0].device) throw Stale();
    tensor.group = index;
    tensor.sequence = p.sequence;
    tensor.clock.t = p.done;
    tensor.done = &p.done;
    tensor.device_counts = true;
    const bool half = size_of(v[0].format) == 2;  // master and noisy are for these alone
    if ((half && group.master != kNoMaster) != p.parts.residual ||
        (p.parts.residual && v[2 + p.parts.states].format != residual_format(group.master)))
      throw Stale();
    const Format state = p.n_scales ? kI8 : p.parts.states ? v[2].format : v[0].format;
    tensor.kernel = find_kernel(group.kernel,
                                {v[0].format, v[1].format, state, half ? group.master : kNoMaster, half && group.noisy,
                                 state == kI8 || (size_of(state) == 2 && (group.noisy_state || !half))});
    if (tensor.kernel.form < 0) throw Stale();
    if (!p.sparse) {
      lay_out(v, p.parts, tensor, layouts_);
    } else {
      int culprit;
      if (v[0].device != kHost || !lay_out_rows(v, p.parts, p.n_scales, indices, tensor, lookups_, &culprit).empty())
        throw Stale();
      tables_.push_back({index, int(&p - group.params.data())});
    }
    for (int k = 0; k < p.n_scales; ++k) tensor.span.scale[k] = scales[k];
    Extent own = extent_of(v[0], true, 0, 0), its = extent_of(v[1], false, 0, 1);
    if (own.low < its.high && its.low < own.high) throw Stale();
    if (v[0].device == kHost) {
      prefetch(tensor.step.at);
      step_.add(tensor);
    } else {
      const auto [at, fresh] = streams_.try_emplace(v[0].device, nullptr);
      bool known;
      if (fresh) at->second = stream_of(types_[0], v[0].device, &known);
      step_.add(tensor, v[0].device, nullptr, at->second);
    }
    active_.push_back(&p);
    grads_.push_back(std::move(grad));
    return moved;
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
  std::vector<TorchGroup> groups_;
  py::object grad_ = interned(py::str("grad")), params_ = interned(py::str("params")),
             maximize_ = interned(py::str("maximize")), is_sparse_ = interned(py::str("is_sparse"));

  Step step_;
  std::vector<std::unique_ptr<Strided>> layouts_;
  std::vector<std::unique_ptr<Lookups>> lookups_;
  std::vector<std::pair<int, int>> tables_;  // of those with sparse gradients, in their order: group, number in it
  std::vector<py::object> grads_;
  std::vector<Param*> active_;                             // those with a gradient
  std::map<int, void*> streams_;                           // torch's, by device
  mutable std::deque<std::vector<int64_t>> layouts_read_;  // shapes and strides that no tensor lends
  double norm_ = -1;
};

}  // namespace

void bind_torch_plan(py::module_& m) {
  py::class_<TorchPlan>(m, "TorchPlan", "The parameters of a torch optimizer, remembered between steps.")
      .def(py::init<py::dict, py::tuple, py::tuple, py::object, py::object, bool>(), py::arg("state"), py::arg("types"),
           py::arg("dtypes"), py::arg("is_neg"), py::arg("bump"), py::arg("exchange"))
      .def("add_group", &TorchPlan::add_group, py::arg("options"), py::arg("kernel"), py::arg("hyper"),
           py::arg("truths"), py::arg("same"), py::arg("master"), py::arg("noisy"), py::arg("noisy_state"))
      .def("add_param", &TorchPlan::add_param, py::arg("tensor"), py::arg("kind"), py::arg("state") = py::none(),
           py::arg("operands") = py::list(), py::arg("step") = py::none(), py::arg("carry") = py::none(),
           py::arg("done") = 0, py::arg("residual") = py::none(), py::arg("ema") = py::none(),
           py::arg("scales") = py::list(), py::arg("sequence") = 0, py::arg("sparse") = false)
      .def("finish", &TorchPlan::finish)
      .def("trouble", &TorchPlan::trouble, py::arg("tensor"), py::arg("written"))
      .def("meet", &TorchPlan::meet, py::arg("a"), py::arg("b"))
      .def("conflicts", &TorchPlan::conflicts)
      .def("step", &TorchPlan::step, py::arg("state"), py::arg("param_groups"), py::arg("unscale"), py::arg("max_norm"),
           py::arg("threads"), py::arg("found_inf") = py::none(), py::arg("grad_scale") = py::none(),
           py::arg("norm") = py::none())
      .def_property_readonly("norm", &TorchPlan::norm);
}

}  // namespace fusedopt
