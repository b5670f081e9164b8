// Losses and layers of a network over C-contiguous float64 or float32 arrays. Everything is checked before the first
// write; friendlier arguments (copies of odd layouts, reductions) are python/fusedopt/losses.py's.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bind.h"
#include "network/linear.h"
#include "rules/element.h"

namespace fusedopt {
namespace {

std::string number_text(double x) { return py::str(py::float_(x)).cast<std::string>(); }

// The arrays of one call: all of one format, the first one's.
class Arrays {
 public:
  Format format = kF64;

  // An array of the shape of `like` if given; nullptr data for None.
  View take(py::handle object, const char* name, bool written, const View* like = nullptr) {
    if (object.is_none()) return {};
    View v = view_of(object, keep_, [=] { return std::string(name); });
    if (first_.empty()) {
      if (v.format != kF64 && v.format != kF32)
        throw py::type_error(std::string(name) + ": expected float64 or float32, got " + name_of(v.format));
      format = v.format;
      first_ = name;
    } else if (v.format != format) {
      throw py::type_error(std::string(name) + ": expected dtype " + name_of(format) + " like " + first_ + ", got " +
                           name_of(v.format));
    }
    if (!v.contiguous()) throw py::value_error(std::string(name) + ": expected a C-contiguous array");
    if (written && v.read_only) throw py::value_error(std::string(name) + ": the array is read-only");
    if (like && !v.same_shape(*like))
      throw py::value_error(std::string(name) + ": expected shape " + shape_text(*like) + ", got " + shape_text(v));
    return v;
  }

  View vector(py::handle object, const char* name, int64_t n, bool written = false) {
    View v = take(object, name, written);
    if (v.data && (v.ndim != 1 || v.shape[0] != n))
      throw py::value_error(std::string(name) + ": expected shape (" + std::to_string(n) + ",), got " + shape_text(v));
    return v;
  }

  View matrix(py::handle object, const char* name, bool written = false, const View* like = nullptr) {
    View v = take(object, name, written, like);
    if (v.data && v.ndim != 2)
      throw py::value_error(std::string(name) + ": expected two dimensions, got shape " + shape_text(v));
    return v;
  }

 private:
  std::vector<py::object> keep_;
  std::string first_;
};

double number_at(const View& v, int64_t i) {
  return v.format == kF64 ? reinterpret_cast<const double*>(v.data)[i] : reinterpret_cast<const float*>(v.data)[i];
}

py::dict element_losses() {
  py::dict d;
  const NetworkTable& t = network_table();
  for (int i = 0; i < t.n_losses; ++i) d[t.losses[i].name] = i;
  return d;
}

// A weight for each row of the prediction (the first dimension), or for each element.
double element_loss(int loss, py::object prediction, py::object target, py::object weight, py::object value,
                    py::object gradient, double parameter, double scale, int threads) {
  static const char* const kTargetText[] = {"", "numbers in [0, 1]", "-1 or 1", "numbers >= 0"};
  const NetworkTable& t = network_table();
  if (loss < 0 || loss >= t.n_losses) throw py::index_error("loss: no such loss");
  Arrays a;
  const View p = a.take(prediction, "prediction", false), y = a.take(target, "target", false, &p);
  const View g = a.take(gradient, "out", true, &p), v = a.take(value, "value", true, &p);
  const View w = a.take(weight, "sample_weight", false);
  if (!p.data || !y.data || !g.data) throw py::type_error("prediction, target, out: expected arrays, got None");
  const int64_t n = p.size(), weights = w.data ? w.size() : 0;
  if (w.data && !w.same_shape(p) && !(w.ndim == 1 && p.ndim > 0 && w.shape[0] == p.shape[0]))
    throw py::value_error("sample_weight: expected one for each row or element of prediction, got shape " +
                          shape_text(w));
  const Targets targets = t.losses[loss].targets;
  int64_t wrong = 0;
  double sum = 0;
  {
    py::gil_scoped_release nogil;
    threads = threads_or_default(threads);
    wrong = count_unfit(a.format, y.data, n, targets, threads);
    if (!wrong) {
      LossSpan s{p.data, y.data, w.data, v.data, g.data, 0, n, weights ? n / weights : 1, parameter, scale};
      sum = run_loss(loss, a.format, s, threads);
    }
  }
  if (wrong) {
    auto fits = [&](double x) {
      return targets == kPlusMinusOne ? x == -1 || x == 1 : x >= 0 && x <= (targets == kZeroToOne ? 1 : 1e308);
    };
    int64_t i = 0;
    while (i + 1 < n && fits(number_at(y, i))) ++i;
    throw py::value_error(std::string("target: expected ") + kTargetText[targets] + ", got " +
                          number_text(number_at(y, i)) + " at flat index " + std::to_string(i));
  }
  return sum;
}

// Either labels (int64, one a row) or targets (a distribution a row).
double softmax_loss(py::object logits, py::object labels, py::object targets, py::object class_weight,
                    py::object weight, py::object value, py::object gradient, double smoothing, double scale,
                    int threads) {
  Arrays a;
  const View x = a.matrix(logits, "logits");
  if (!x.data) throw py::type_error("logits: expected an array, got None");
  const int64_t rows = x.shape[0], columns = x.shape[1];
  const View y = a.matrix(targets, "targets", false, &x), g = a.matrix(gradient, "out", true, &x);
  const View v = a.vector(value, "value", rows, true), w = a.vector(weight, "sample_weight", rows);
  const View c = a.vector(class_weight, "class_weight", columns);
  if (!g.data || labels.is_none() == !y.data) throw py::type_error("expected out, and either labels or targets");
  const int64_t* label = nullptr;
  if (!labels.is_none()) {
    auto array = py::reinterpret_borrow<py::array>(labels);
    if (!py::isinstance<py::array>(labels) || !array.dtype().is(py::dtype::of<int64_t>()) ||
        !(array.flags() & py::array::c_style) || array.ndim() != 1 || array.shape(0) != rows)
      throw py::value_error("labels: expected contiguous int64 of shape (" + std::to_string(rows) + ",)");
    label = static_cast<const int64_t*>(array.data());
    for (int64_t i = 0; i < rows; ++i)
      if (label[i] < 0 || label[i] >= columns)
        throw py::value_error("labels: expected integers in [0, " + std::to_string(columns) + "), got " +
                              std::to_string(label[i]) + " at index " + std::to_string(i));
  }
  py::gil_scoped_release nogil;
  SoftmaxSpan s{x.data, label, y.data, c.data, w.data, v.data, g.data, rows, columns, smoothing, scale};
  return run_softmax(a.format, s, threads_or_default(threads));
}

double penalty(py::object weights, py::object gradient, double l1, double l2, double scale, int threads) {
  Arrays a;
  const View w = a.take(weights, "weights", false), g = a.take(gradient, "out", true, &w);
  if (!w.data) throw py::type_error("weights: expected an array, got None");
  py::gil_scoped_release nogil;
  return run_penalty(a.format, {w.data, g.data, w.size(), l1, l2, scale}, threads_or_default(threads));
}

int activation_of(int activation) {
  if (activation < 0 || activation >= kActivations) throw py::index_error("activation: no such activation");
  return activation;
}

// out = activation(z + bias); `kept` receives z + bias. Any of z, kept, out may be one array.
void layer_forward(int activation, py::object z, py::object bias, py::object kept, py::object out, int threads) {
  Arrays a;
  const View x = a.matrix(z, "z"), y = a.matrix(out, "out", true, &x), k = a.matrix(kept, "kept", true, &x);
  if (!x.data || !y.data) throw py::type_error("z, out: expected arrays, got None");
  const View b = a.vector(bias, "bias", x.shape[1]);
  auto loop = network_table().forward[activation_of(activation)][a.format];
  LayerSpan s{x.data, nullptr, y.data, k.data, nullptr, b.data, nullptr, nullptr, nullptr, x.shape[0], x.shape[1]};
  py::gil_scoped_release nogil;
  run_layer(loop, a.format, s, 0, threads_or_default(threads));
}

template <class T>
void store_as(const double* from, int64_t n, char* to) {
  for (int64_t i = 0; i < n; ++i) reinterpret_cast<T*>(to)[i] = T(from[i]);
}
void store(const double* from, int64_t n, const View& to) {
  if (to.data) (to.format == kF64 ? store_as<double> : store_as<float>)(from, n, to.data);
}

// Sums of columns: kept from call to call, so that a step allocates nothing.
std::vector<double>& sums_of(size_t n) {
  thread_local std::vector<double> sums;
  if (sums.size() < n) sums.resize(n);
  return sums;
}

// delta *= slope of the activation at `kept`; sums = delta's columns added up.
void layer_backward(int activation, py::object kept, py::object delta, py::object sums, int threads) {
  Arrays a;
  const View d = a.matrix(delta, "delta", true), k = a.matrix(kept, "kept", false, &d);
  if (!d.data) throw py::type_error("delta: expected an array, got None");
  if (!k.data && activation != kIdentity) throw py::type_error("kept: expected an array, got None");
  const int64_t columns = d.shape[1];
  const View b = a.vector(sums, "sums", columns, true);
  auto loop = network_table().backward[activation_of(activation)][a.format];
  std::vector<double>& added = sums_of(size_t(columns));
  {
    py::gil_scoped_release nogil;
    LayerSpan s{k.data ? k.data : d.data,
                nullptr,
                d.data,
                nullptr,
                added.data(),
                nullptr,
                nullptr,
                nullptr,
                nullptr,
                d.shape[0],
                columns};
    run_layer(loop, a.format, s, 1, threads_or_default(threads));
  }
  store(added.data(), columns, b);
}

// out = x / (1 - probability), or 0 with that probability; the same seed and sequence drop the same elements.
void dropout(py::object x, py::object out, double probability, uint64_t seed, uint64_t sequence, int threads) {
  if (!(probability >= 0 && probability < 1))
    throw py::value_error("probability: expected a number in [0, 1), got " + number_text(probability));
  Arrays a;
  const View from = a.take(x, "x", false), to = a.take(out, "out", true, &from);
  if (!from.data || !to.data) throw py::type_error("x, out: expected arrays, got None");
  const uint64_t h = mixed(seed, sequence);
  const DropoutKey key{uint32_t(h), uint32_t(h >> 32), uint32_t(probability * 4294967296.0), 1 / (1 - probability)};
  py::gil_scoped_release nogil;
  run_dropout(a.format, from.data, to.data, from.size(), key, threads_or_default(threads));
}

// normal = (x - mean) / sqrt(variance + eps) over the rows, out = gain normal + shift; mean, variance and rate (the
// factor before the parenthesis) are written. normal and out may be x.
void batch_norm_forward(py::object x, py::object gain, py::object shift, py::object mean, py::object variance,
                        py::object rate, py::object normal, py::object out, double eps, int threads) {
  Arrays a;
  const View in = a.matrix(x, "x"), n = a.matrix(normal, "normal", true, &in), o = a.matrix(out, "out", true, &in);
  if (!in.data || !n.data || !o.data) throw py::type_error("x, normal, out: expected arrays, got None");
  const int64_t rows = in.shape[0], columns = in.shape[1];
  const View g = a.vector(gain, "gain", columns), b = a.vector(shift, "shift", columns);
  const View m = a.vector(mean, "mean", columns, true), v = a.vector(variance, "variance", columns, true);
  const View r = a.vector(rate, "rate", columns, true);
  if (!g.data || !b.data || !m.data || !v.data || !r.data) throw py::type_error("expected an array, got None");
  const NetworkTable& t = network_table();
  std::vector<double>& sums = sums_of(size_t(columns));
  py::gil_scoped_release nogil;
  threads = threads_or_default(threads);
  LayerSpan s{in.data, nullptr, o.data, n.data, sums.data(), m.data, r.data, g.data, b.data, rows, columns};
  run_layer(t.column_sums[a.format], a.format, s, 1, threads);
  for (int64_t c = 0; c < columns; ++c) sums[size_t(c)] /= double(rows);
  store(sums.data(), columns, m);
  run_layer(t.column_squares[a.format], a.format, s, 1, threads);
  for (int64_t c = 0; c < columns; ++c) sums[size_t(c)] /= double(rows);
  store(sums.data(), columns, v);
  for (int64_t c = 0; c < columns; ++c) sums[size_t(c)] = 1 / sqrt(sums[size_t(c)] + eps);
  store(sums.data(), columns, r);
  run_layer(t.normalize[a.format], a.format, s, 0, threads);
}

// The gradients of x (written to `delta`, which holds that of out), gain and shift.
void batch_norm_backward(py::object delta, py::object normal, py::object rate, py::object gain, py::object gain_grad,
                         py::object shift_grad, int threads) {
  Arrays a;
  const View d = a.matrix(delta, "delta", true), n = a.matrix(normal, "normal", false, &d);
  if (!d.data || !n.data) throw py::type_error("delta, normal: expected arrays, got None");
  const int64_t rows = d.shape[0], columns = d.shape[1];
  const View r = a.vector(rate, "rate", columns), g = a.vector(gain, "gain", columns);
  const View dg = a.vector(gain_grad, "gain_grad", columns, true),
             db = a.vector(shift_grad, "shift_grad", columns, true);
  if (!r.data || !g.data || !dg.data || !db.data) throw py::type_error("expected an array, got None");
  const NetworkTable& t = network_table();
  const size_t width = size_t(columns), item = size_of(a.format);
  std::vector<double>& sums = sums_of(2 * width);
  thread_local std::vector<char> factors;
  factors.resize(3 * width * item);
  py::gil_scoped_release nogil;
  threads = threads_or_default(threads);
  char *factor = factors.data(), *mean = factor + width * item, *slope = mean + width * item;
  LayerSpan s{d.data, n.data, d.data, nullptr, sums.data(), factor, mean, slope, nullptr, rows, columns};
  run_layer(t.normal_sums[a.format], a.format, s, 2, threads);
  store(sums.data(), columns, db);
  store(sums.data() + width, columns, dg);
  for (size_t c = 0; c < 2 * width; ++c) sums[c] /= double(rows);
  auto as = a.format == kF64 ? store_as<double> : store_as<float>;
  as(sums.data(), columns, mean);
  as(sums.data() + width, columns, slope);
  for (int64_t c = 0; c < columns; ++c) sums[size_t(c)] = number_at(r, c) * number_at(g, c);
  as(sums.data(), columns, factor);
  run_layer(t.normal_back[a.format], a.format, s, 0, threads);
}

// A contiguous vector of int64, or of int32 where `wide` says whether; nullptr for None.
const void* integers(py::handle object, const char* name, int64_t n, bool* wide) {
  if (object.is_none()) return nullptr;
  auto array = py::reinterpret_borrow<py::array>(object);
  const bool is = py::isinstance<py::array>(object), long_ = is && array.dtype().is(py::dtype::of<int64_t>());
  const bool short_ = is && wide && array.dtype().is(py::dtype::of<int32_t>());
  if (!(long_ || short_) || !(array.flags() & py::array::c_style) || array.ndim() != 1 || array.shape(0) != n)
    throw py::value_error(std::string(name) + ": expected contiguous int64" + (wide ? " or int32" : "") +
                          " of shape (" + std::to_string(n) + ",)");
  if (wide) *wide = long_;
  return array.data();
}

// Raises ValueError unless n integers are in [0, limit), and do not decrease if `ascending`.
template <class I>
void expect_within(const void* integers, const char* name, int64_t n, int64_t limit, bool ascending = false) {
  auto* x = static_cast<const I*>(integers);
  for (int64_t i = 0; i < n; ++i)
    if (x[i] < 0 || x[i] >= limit || (ascending && i && x[i] < x[i - 1]))
      throw py::value_error(std::string(name) + ": expected integers in [0, " + std::to_string(limit) + ")" +
                            (ascending ? " that do not decrease" : "") + ", got " + std::to_string(x[i]) +
                            " at index " + std::to_string(i));
}

// One epoch of a linear model: (loss times weight, weight, steps, the last batch's loss, its gradient's norm or None).
// x is a matrix; or the values of a CSR matrix of `features` columns, with its indices and indptr.
py::tuple linear_epoch(py::object batch, py::object x, py::object indices, py::object indptr, int64_t features,
                       py::object y, py::object weight, py::object order, py::object params, py::object grads,
                       int64_t batch_size, int loss, double parameter, double divisor, bool intercepts, double l1,
                       double l2, bool per_row, double proximal, const std::vector<double>& rates, double max_norm,
                       py::object mean, const std::vector<double>& follow) {
  const NetworkTable& t = network_table();
  if (loss < 0 || loss >= t.n_losses) throw py::index_error("loss: no such loss");
  if (batch_size < 1) throw py::value_error("batch_size: expected an integer >= 1");
  Arrays a;
  const View target = a.matrix(y, "y");
  if (!target.data) throw py::type_error("y: expected an array, got None");
  const int64_t n = target.shape[0], outputs = target.shape[1];
  const bool sparse = !indptr.is_none();
  const View in = a.take(x, "x", false);
  if (!in.data || (sparse ? in.ndim != 1 : in.ndim != 2 || in.shape[0] != n || in.shape[1] != features))
    throw py::value_error("x: expected one row of features for each row of y");
  const void *columns = nullptr, *begins = nullptr;
  bool wide = false;
  if (sparse) {
    bool both = false;
    columns = integers(indices, "indices", in.size(), &wide);
    begins = integers(indptr, "indptr", n + 1, &both);
    if (!columns || both != wide) throw py::type_error("indices, indptr: expected arrays of one dtype");
    (wide ? expect_within<int64_t> : expect_within<int32_t>)(columns, "indices", in.size(), features, false);
    (wide ? expect_within<int64_t> : expect_within<int32_t>)(begins, "indptr", n + 1, in.size() + 1, true);
  }
  const View w = a.vector(weight, "weight", n);
  const View p = a.vector(params, "params", (features + 1) * outputs, true);
  const View g = a.vector(grads, "grads", (features + 1) * outputs, true);
  const View m = a.vector(mean, "mean", (features + 1) * outputs, true);
  if (!p.data || !g.data) throw py::type_error("params, grads: expected arrays, got None");
  auto* rows = static_cast<const int64_t*>(integers(order, "order", n, nullptr));
  if (rows) expect_within<int64_t>(rows, "order", n, n);
  const size_t batches = size_t((n + batch_size - 1) / batch_size);
  if (rates.size() < batches || (m.data && follow.size() < batches))
    throw py::value_error("rates, follow: expected a number for each batch");
  Step& step = checked_step(batch);
  const std::vector<Tensor>& tensors = step.host();
  if (step.groups.size() != 1 || tensors.size() != 1 || step.on_devices() || tensors[0].span.param != p.data ||
      tensors[0].span.grad != g.data || tensors[0].span.n != p.size() || tensors[0].strided)
    throw py::value_error("batch: expected one tensor, params with grads");
  LinearEpoch epoch{};
  epoch.x = in.data, epoch.y = target.data, epoch.weight = w.data;
  epoch.columns = columns, epoch.begins = begins, epoch.wide = wide;
  epoch.order = rows;
  epoch.n = n, epoch.features = features, epoch.outputs = outputs, epoch.batch = batch_size;
  epoch.params = p.data, epoch.grads = g.data, epoch.intercepts = intercepts;
  epoch.loss = loss, epoch.parameter = parameter, epoch.divisor = divisor;
  epoch.l1 = l1, epoch.l2 = l2, epoch.per_row = per_row, epoch.proximal = proximal;
  epoch.rates = rates.data(), epoch.max_norm = max_norm, epoch.mean = m.data, epoch.follow = follow.data();
  EpochResult r;
  int64_t wrong;
  {
    py::gil_scoped_release nogil;
    wrong = count_unfit(a.format, target.data, target.size(), t.losses[loss].targets, 1);
    if (!wrong) r = run_linear_epoch(a.format, epoch, step);
  }
  if (wrong) throw py::value_error("y: expected targets that the loss allows");
  return py::make_tuple(r.loss, r.weight, r.steps, r.last_loss,
                        r.norm < 0 ? py::object(py::none()) : py::float_(r.norm));
}

}  // namespace

void bind_losses(py::module_& m) {
  using namespace py::literals;
  m.def("element_losses", &element_losses, "The losses of single elements: name -> index.");
  m.def("element_loss", &element_loss, "loss"_a, "prediction"_a, "target"_a, "weight"_a, "value"_a, "gradient"_a,
        "parameter"_a, "scale"_a, "threads"_a, "Writes values and scaled gradients; returns the sum of the values.");
  m.def("softmax_loss", &softmax_loss, "logits"_a, "labels"_a, "targets"_a, "class_weight"_a, "weight"_a, "value"_a,
        "gradient"_a, "smoothing"_a, "scale"_a, "threads"_a,
        "Writes values and scaled gradients; returns the sum of the values.");
  m.def("penalty", &penalty, "weights"_a, "gradient"_a, "l1"_a, "l2"_a, "scale"_a, "threads"_a,
        "Adds the scaled gradient of l1 |w| + l2 w^2 / 2; returns its sum.");
  m.def("layer_forward", &layer_forward, "activation"_a, "z"_a, "bias"_a, "kept"_a, "out"_a, "threads"_a,
        "out = activation(z + bias).");
  m.def("layer_backward", &layer_backward, "activation"_a, "kept"_a, "delta"_a, "sums"_a, "threads"_a,
        "delta *= the activation's slope; sums = delta's columns.");
  m.def("dropout", &dropout, "x"_a, "out"_a, "probability"_a, "seed"_a, "sequence"_a, "threads"_a,
        "Drops elements, and scales the others up.");
  m.def("batch_norm_forward", &batch_norm_forward, "x"_a, "gain"_a, "shift"_a, "mean"_a, "variance"_a, "rate"_a,
        "normal"_a, "out"_a, "eps"_a, "threads"_a, "Normalises the columns over the rows.");
  m.def("batch_norm_backward", &batch_norm_backward, "delta"_a, "normal"_a, "rate"_a, "gain"_a, "gain_grad"_a,
        "shift_grad"_a, "threads"_a, "The way back of batch_norm_forward.");
  m.def("linear_epoch", &linear_epoch, "batch"_a, "x"_a, "indices"_a, "indptr"_a, "features"_a, "y"_a, "weight"_a,
        "order"_a, "params"_a, "grads"_a, "batch_size"_a, "loss"_a, "parameter"_a, "divisor"_a, "intercepts"_a, "l1"_a,
        "l2"_a, "per_row"_a, "proximal"_a, "rates"_a, "max_norm"_a, "mean"_a, "follow"_a,
        "One epoch of a linear model; returns loss times weight, weight, steps, the last batch's loss and norm.");
}

}  // namespace fusedopt
