// `_core.TorchPlan`: the parameters of a torch optimizer, remembered between steps. Each step looks at every parameter
// and gradient anew (both may have moved), at the state's identity, and at the groups' options; what no longer fits is
// reported as stale before anything is written, and Python builds a new plan.
#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <map>
#include <string>

#include "bind.h"
#include "device_plan.h"
#include "dispatch.h"
#include "view.h"

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

// A 0-d tensor that holds a step count or a carried number.
struct Scalar {
  char* data = nullptr;
  Format format = kF32;
  int device = -1;
  double get() const {
    return format == kF64 ? *reinterpret_cast<double*>(data) : double(*reinterpret_cast<float*>(data));
  }
  void set(double x) const {
    if (format == kF64) {
      *reinterpret_cast<double*>(data) = x;
    } else {
      *reinterpret_cast<float*>(data) = float(x);
    }
  }
};

enum Kind { kOurs, kIdle, kForeign };  // updated here; without a gradient so far; left to torch

constexpr int kMaxValues = 12;  // entries of one parameter's state dict that can be watched
// The state's tensors are watched by identity, and their memory is read anew where that costs little: at every step
// from kAlwaysRead elements on, below in every kReadEvery-th (reaching a tensor costs more than updating 64 elements).
constexpr int64_t kAlwaysRead = 1024;
constexpr size_t kReadEvery = 16;

constexpr int kShape = 5;  // dimensions of a parameter that are remembered

struct Param {
  py::object tensor;
  py::object state;                    // the dict opt.state[p], or None
  PyObject* values[kMaxValues] = {};   // what that dict holds, in its order
  std::vector<py::object> keep;        // keeps them and their memory alive
  py::object operands[kOperands - 2];  // in the order of Parts
  py::object scales[kMaxStates];       // of quantised states
  py::object step, carry;              // 0-d tensors, or None
  View views[kOperands] = {};          // param, grad, operands: as of the last step
  float* scale_at[kMaxStates] = {};
  const void* record = nullptr;  // lies within torch's record of the parameter
  int64_t shape[kShape] = {};    // when the state was last read,
  int ndim = -1;                 // which it has not been
  Scalar step_at, carry_at;
  int64_t done = 0;  // steps so far, where there is no step tensor
  Kind kind = kIdle;
  int n_values = 0, n_operands = 0, n_scales = 0;
  Parts parts = {};
  int64_t stream = 0;
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
      : state_(std::move(state)), dtypes_(std::move(dtypes)), is_neg_(std::move(is_neg)), bump_(std::move(bump)) {
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
                 int64_t done, py::object rest, py::object ema, py::list scales, int64_t stream) {
    Param p;
    p.kind = Kind(kind);
    p.tensor = std::move(tensor);
    p.state = std::move(state);
    if (!p.state.is_none()) {
      if (py::len(p.state) > size_t(kMaxValues)) throw py::value_error("state: too many entries");
      for (auto item : py::reinterpret_borrow<py::dict>(p.state)) {
        p.values[p.n_values++] = item.second.ptr();
        p.keep.push_back(py::reinterpret_borrow<py::object>(item.second));
        if (py::hasattr(item.second, "untyped_storage")) p.keep.push_back(item.second.attr("untyped_storage")());
      }
    }
    for (py::handle o : operands) p.operands[p.n_operands++] = py::reinterpret_borrow<py::object>(o);
    p.parts = {p.n_operands, !rest.is_none(), !ema.is_none()};
    if (p.parts.rest) p.operands[p.n_operands++] = std::move(rest);
    if (p.parts.ema) p.operands[p.n_operands++] = std::move(ema);
    for (py::handle s : scales) p.scales[p.n_scales++] = py::reinterpret_borrow<py::object>(s);
    p.stream = stream;
    p.step = std::move(step);
    p.carry = std::move(carry);
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

  // Is `tensor` one that the kernels take as it is: of a type of ours, on the CPU or a device served, no negative bit?
  bool plain(py::handle tensor) const {
    DLTensor t;
    Format f;
    int device;
    return exact(tensor.ptr()) && !negative(tensor.ptr()) && read(tensor.ptr(), &t) && format_of(t, &f) &&
           f < kFloats && device_of(t, &device) && !overlaps_itself(view_of(t, f, device));
  }

  // One step. False: stale, nothing was touched. Where all is on one device found_inf, grad_scale and the tensor for
  // the norm may lie there, too; else they are None.
  bool step(py::handle state, py::list param_groups, double unscale, double max_norm, int threads, py::object found_inf,
            py::object grad_scale, py::object norm) {
    if (busy_) throw std::runtime_error("step() of this optimizer is already running in another thread");
    try {
      look(state, param_groups);
    } catch (const Stale&) {
      grads_.clear();
      return false;
    }
    DeviceScaling scaling;
    scaling.unscale = unscale;
    scaling.max_norm = max_norm;
    if (!found_inf.is_none()) scaling.found_inf = reinterpret_cast<float*>(scalar(found_inf).data);
    if (!grad_scale.is_none()) scaling.grad_scale = reinterpret_cast<float*>(scalar(grad_scale).data);
    if (!norm.is_none()) {
      const Scalar s = scalar(norm);
      scaling.norm = s.data;
      scaling.norm_wide = s.format == kF64;
    }
    std::vector<std::pair<DevicePlan*, void*>> devices;
    for (auto& [device, plan] : devices_) {
      if (plan->rows.empty()) continue;
      bool known;
      plan->groups = plan_.groups;
      plan->rates = rates_;
      devices.emplace_back(plan.get(), stream_of(types_[0], device, &known));
    }
    // Where no device leaves its norm in the caller's tensor it is found here, as is one over several devices.
    const bool host = !plan_.rows.empty() || devices.empty() || (max_norm > 0 && !scaling.norm);
    {
      Busy busy(busy_);
      py::gil_scoped_release nogil;
      if (max_norm > 0 && devices.size() + host > 1) {  // one norm over several devices: waits for each
        const double here = plan_.norm(Team::kTorch, threads);
        double squares = here * here;
        for (auto [plan, stream] : devices) {
          const double there = plan->norm(stream);
          squares += there * there;
        }
        norm_ = sqrt(squares) * fabs(unscale);
        scaling.unscale *= clip_factor(max_norm, norm_);
        scaling.max_norm = 0;
      }
      if (host) {
        advance();
        const double own = plan_.run({scaling.unscale, scaling.max_norm}, Team::kTorch, threads);
        if (scaling.max_norm > 0 || max_norm == 0) norm_ = own;
      }
      for (auto [plan, stream] : devices) plan->run(scaling, stream);
    }
    for (Param* p : on_device_) ++p->done;
    turn_ = (turn_ + 1) % kReadEvery;
    active_.insert(active_.end(), on_device_.begin(), on_device_.end());
    tell_autograd();
    grads_.clear();
    return true;
  }

  double norm() const { return norm_; }

  // Positions (group, index) of parameters whose memory meets that of another's parameter or state.
  py::list conflicts() {
    std::vector<Extent> extents;
    std::vector<std::pair<int, int>> places;
    for (size_t g = 0; g < groups_.size(); ++g)
      for (size_t i = 0; i < groups_[g].params.size(); ++i) {
        const Param& p = groups_[g].params[i];
        if (p.kind != kOurs) continue;
        places.emplace_back(int(g), int(i));
        add_extents(p, int(places.size()) - 1, extents);
      }
    py::list out;
    for (auto& [a, b] : meetings(extents, 100000))
      for (int row : {a.row, b.row}) out.append(py::cast(places[size_t(row)]));
    return out;
  }

 private:
  struct Busy {
    bool& flag;
    explicit Busy(bool& f) : flag(f) { flag = true; }
    ~Busy() { flag = false; }
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
  View view(PyObject* o) const {
    DLTensor t;
    Format f;
    int device;
    if (!read(o, &t) || !format_of(t, &f) || !device_of(t, &device)) throw Stale();
    return view_of(t, f, device);
  }
  Scalar scalar(const py::object& o) const {
    View v = view(o.ptr());
    if (v.size() != 1 || (v.format != kF32 && v.format != kF64)) throw Stale();
    return {v.data, v.format, v.device};
  }
  // A learning rate that lies on a device, where steps there read it.
  bool rate_on_device(PyObject* o, DevicePlan::Rate* rate) const {
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

  // Everything a step needs to know, read and compared before the first write.
  void look(py::handle state, const py::list& param_groups) {
    same_state(state);
    if (py::len(param_groups) != groups_.size()) throw Stale();
    plan_.rows.clear();
    plan_.groups.resize(groups_.size());
    layouts_.clear();
    layouts_read_.clear();
    grads_.clear();
    active_.clear();
    on_device_.clear();
    for (auto& [device, plan] : devices_) plan->rows.clear();
    rates_.assign(groups_.size(), {});
    seen_ = 0;
    bool moved = false;
    for (size_t g = 0; g < groups_.size(); ++g) {
      TorchGroup& group = groups_[g];
      if (PyList_GET_ITEM(param_groups.ptr(), py::ssize_t(g)) != group.options.ptr()) throw Stale();
      for (auto& [key, was] : group.truths)
        if (truth(group.options, key) != was) throw Stale();
      for (auto& [key, was] : group.same)
        if (get(group.options, key) != was.ptr()) throw Stale();
      Group& to = plan_.groups[g];
      to.hyper.resize(group.hyper.size());
      const Source& lr = group.hyper[0];
      const bool far = !lr.key.is_none() && lr.index < 0 && rate_on_device(get(group.options, lr.key), &rates_[g]);
      for (size_t h = far ? 1 : 0; h < group.hyper.size(); ++h) to.hyper[h] = value(group.options, group.hyper[h]);
      to.maximize = truth(group.options, maximize_);
      to.l1 = value(group.options, group.l1);
      to.ema_weight = 1 - value(group.options, group.ema_decay);
      to.seed = uint64_t(int64_t(value(group.options, group.seed)));
      PyObject* params = get(group.options, params_);
      if (!PyList_CheckExact(params) || size_t(PyList_GET_SIZE(params)) != group.params.size()) throw Stale();
      for (size_t i = 0; i < group.params.size(); ++i) {
        Param& p = group.params[i];
        hint_ahead(group.params, i);
        if (PyList_GET_ITEM(params, py::ssize_t(i)) != p.tensor.ptr()) throw Stale();
        if (p.kind != kForeign) moved |= look(p, int(g), group);
      }
      if (far && !all_on(rates_[g].device, int(g))) {  // not everybody can read it: waits for it
        rates_[g] = {};
        to.hyper[0] = value(group.options, lr);
      }
    }
    if (moved && py::len(conflicts()) > 0) throw Stale();
  }

  // Do all rows of the group looked at last lie on this device?
  bool all_on(int device, int group) const {
    if (!plan_.rows.empty() && plan_.rows.back().group == group) return false;
    for (const auto& [number, plan] : devices_)
      if (number != device && !plan->rows.empty() && plan->rows.back().row.group == group) return false;
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

  // Tensors are small objects scattered over memory, and a step over a thousand of them waits for little else: ask
  // early for the lines that the last step found. Hints, harmless where they are wrong.
#if defined(__GNUC__) || defined(__clang__)
  static void hint(const void* at) { __builtin_prefetch(at); }
#else
  static void hint(const void*) {}
#endif
  static const void* line(const void* at, int n) { return static_cast<const char*>(at) + 64 * n; }

  static void hint_object(const Param& p) {
    hint(p.tensor.ptr());
    for (int n = -1; p.record && n <= 2; ++n) hint(line(p.record, n));
  }
  // torch keeps the shape of up to five dimensions within the tensor's record, behind the pointers to its storage,
  // autograd data and version.
  static void hint_linked(const Param& p) {
    for (int n = 1; p.record && n <= 6; ++n) hint(static_cast<void* const*>(p.record)[-n]);
  }
  static void hint_ahead(const std::vector<Param>& params, size_t i) {
    if (i + 16 < params.size())
      for (int n = 0; n <= int(sizeof(Param) / 64); ++n) hint(line(&params[i + 16], n));
    if (i + 8 < params.size()) {
      hint_object(params[i + 8]);
      hint(params[i + 8].state.ptr());
      hint(params[i + 8].step_at.data);
    }
    if (i + 4 < params.size()) hint_linked(params[i + 4]);
  }

  // Reads where the state lies. What later steps look at is kept in `p`, not in the tensors; strides are not, and where
  // they matter the state is read at every step.
  void read_state(Param& p) const {
    bool remember = p.views[0].ndim <= kShape;
    for (int k = 0; k < p.n_operands; ++k) {
      View& o = p.views[2 + k];
      o = view(p.operands[k].ptr());
      if (!o.same_shape(p.views[0]) || o.device != p.views[0].device) throw Stale();
      if (o.contiguous()) {
        o.stride = nullptr;
      } else {
        remember = false;
      }
    }
    const View* v = p.views + 2;
    for (int k = 0; k < p.parts.states; ++k)
      if (p.n_scales ? size_of(v[k].format) != 1 : v[k].format != v[0].format) throw Stale();
    if (p.parts.ema && v[p.n_operands - 1].format != ema_format(p.views[0].format)) throw Stale();
    for (int k = 0; k < p.n_scales; ++k) {
      View scale = view(p.scales[k].ptr());
      if (scale.format != kF32 || !scale.contiguous() || scale.size() != (p.views[0].size() + kBlock - 1) / kBlock ||
          scale.device != p.views[0].device)
        throw Stale();
      p.scale_at[k] = reinterpret_cast<float*>(scale.data);
    }
    if (!p.step.is_none()) p.step_at = scalar(p.step);
    if (!p.carry.is_none()) p.carry_at = scalar(p.carry);
    for (const Scalar* s : {&p.step_at, &p.carry_at})
      if (s->data && s->device != p.views[0].device) throw Stale();
    p.ndim = remember ? p.views[0].ndim : -1;
    if (remember) std::copy(p.views[0].shape, p.views[0].shape + p.ndim, p.shape);
  }

  // True if the parameter is not where it was.
  bool look(Param& p, int index, const TorchGroup& group) {
    if (!exact(p.tensor.ptr())) throw Stale();
    py::object grad = grad_of(p.tensor.ptr());
    if (grad.is_none()) return false;
    if (p.kind == kIdle || !exact(grad.ptr()) || negative(grad.ptr())) throw Stale();
    if (!p.state.is_none()) {
      if (PyDict_GET_SIZE(p.state.ptr()) != p.n_values) throw Stale();
      PyObject *key, *held;
      Py_ssize_t at = 0;
      for (int k = 0; k < p.n_values; ++k)
        if (!PyDict_Next(p.state.ptr(), &at, &key, &held) || held != p.values[k]) throw Stale();
    }
    const int n = 2 + p.n_operands;
    const char* last = p.views[0].data;
    View* v = p.views;
    v[0] = view(p.tensor.ptr());
    v[1] = view(grad.ptr());
    p.record = api_ && v[0].ndim > 0 && v[0].ndim <= kShape ? v[0].shape : nullptr;
    if (!v[1].same_shape(v[0]) || v[1].device != v[0].device) throw Stale();
    const bool same_shape = v[0].ndim == p.ndim && std::equal(p.shape, p.shape + p.ndim, v[0].shape);
    if (!same_shape || v[0].size() >= kAlwaysRead || seen_ % kReadEvery == turn_) read_state(p);
    for (int k = 2; k < n; ++k) v[k].shape = v[0].shape;  // equal, and the parameter's is at hand
    const bool moved = v[0].data != last;
    if (moved && (negative(p.tensor.ptr()) || overlaps_itself(v[0]))) throw Stale();
    Row row{};
    row.kernel = group.kernel;
    row.group = index;
    row.stream = p.stream;
    const bool half = size_of(v[0].format) == 2;  // master and noisy are for these alone
    if ((half && group.master != kNoMaster) != p.parts.rest ||
        (p.parts.rest && v[2 + p.parts.states].format != rest_format(group.master)))
      throw Stale();
    const Format state = p.n_scales ? kI8 : p.parts.states ? v[2].format : v[0].format;
    row.loop = find_loop(table().kernels[group.kernel],
                         {v[0].format, v[1].format, state, half ? group.master : kNoMaster, half && group.noisy,
                          state == kI8 || (size_of(state) == 2 && (group.noisy_state || !half))});
    if (row.loop < 0) throw Stale();
    lay_out(v, p.parts, row, layouts_);
    for (int k = 0; k < p.n_scales; ++k) row.span.scale[k] = p.scale_at[k];
    Extent own = extent_of(v[0], true, 0, 0), its = extent_of(v[1], false, 0, 1);
    if (own.low < its.high && its.low < own.high) throw Stale();
    ++seen_;
    if (v[0].device < 0) {
      plan_.rows.push_back(row);
      active_.push_back(&p);
    } else {
      row.clock = {p.done, 0, false};
      plan_on(v[0].device)
          .rows.push_back(
              {row, p.step_at.data, p.carry_at.data, p.step_at.format == kF64, p.carry_at.format == kF64, true});
      on_device_.push_back(&p);
    }
    grads_.push_back(std::move(grad));
    return moved;
  }

  void advance() {
    const Table& t = table();
    for (size_t r = 0; r < plan_.rows.size(); ++r) {
      Row& row = plan_.rows[r];
      Param& p = *active_[r];
      row.clock = {p.step_at.data ? int64_t(p.step_at.get()) : p.done, p.carry_at.data ? p.carry_at.get() : 0,
                   p.carry_at.format == kF32};
      t.kernels[row.kernel].advance(plan_.groups[size_t(row.group)].hyper.data(), row.clock);
      if (p.step_at.data) p.step_at.set(double(row.clock.t));
      if (p.carry_at.data) p.carry_at.set(row.clock.carry);
      p.done = row.clock.t;
    }
  }

  DevicePlan& plan_on(int device) {
    auto& plan = devices_[device];
    if (!plan) plan = std::make_unique<DevicePlan>(device);
    return *plan;
  }

  void tell_autograd() {
    constexpr size_t kAtATime = 16;
    const size_t n = active_.size();
    for (size_t i = 0; i < n; i += kAtATime) {
      const size_t next = std::min(i + kAtATime, n), after = std::min(next + kAtATime, n);
      for (size_t k = next; k < after; ++k) hint_linked(*active_[k]);
      for (size_t k = after; k < std::min(after + kAtATime, n); ++k) hint_object(*active_[k]);
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
  const PyGetSetDef* getter_ = nullptr;
  std::vector<std::pair<py::object, py::object>> entries_;
  std::vector<TorchGroup> groups_;
  py::object grad_ = interned(py::str("grad")), params_ = interned(py::str("params")),
             maximize_ = interned(py::str("maximize"));

  Plan plan_;
  std::vector<std::unique_ptr<Strided>> layouts_;
  std::vector<py::object> grads_;
  std::vector<Param*> active_, on_device_;  // of the rows here and there
  std::map<int, std::unique_ptr<DevicePlan>> devices_;
  std::vector<DevicePlan::Rate> rates_;
  size_t turn_ = 0, seen_ = 0;
  mutable std::deque<std::vector<int64_t>> layouts_read_;  // shapes and strides that no tensor lends
  double norm_ = -1;
  bool busy_ = false;
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
           py::arg("done") = 0, py::arg("rest") = py::none(), py::arg("ema") = py::none(),
           py::arg("scales") = py::list(), py::arg("stream") = 0)
      .def("finish", &TorchPlan::finish)
      .def("plain", &TorchPlan::plain, py::arg("tensor"))
      .def("conflicts", &TorchPlan::conflicts)
      .def("step", &TorchPlan::step, py::arg("state"), py::arg("param_groups"), py::arg("unscale"), py::arg("max_norm"),
           py::arg("threads"), py::arg("found_inf") = py::none(), py::arg("grad_scale") = py::none(),
           py::arg("norm") = py::none())
      .def_property_readonly("norm", &TorchPlan::norm);
}

}  // namespace fusedopt
