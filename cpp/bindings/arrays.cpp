// See arrays.h.
#include "bindings/arrays.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <stdexcept>

#include "step/device.h"

namespace fusedopt {
namespace {

using Npy = py::detail::npy_api;

// NumPy's type number of ml_dtypes.bfloat16, which is known only once that package has been imported.
bool is_bfloat16(const py::dtype& type) {
  static int number = -1;
  if (number >= 0) return type.num() == number;
  if (type.num() < 256 || !py::str(type).equal(py::str("bfloat16"))) return false;
  number = type.num();
  return true;
}

bool numpy_view(const py::array& a, bool integers, View* v, std::string* why, bool* type_error) {
  const py::dtype type = a.dtype();
  *type_error = true;
  if (Py_TYPE(a.ptr()) != Npy::get().PyArray_Type_) {
    py::object ma = py::module_::import("sys").attr("modules").attr("get")("numpy.ma");
    if (!ma.is_none() && py::isinstance(a, ma.attr("MaskedArray"))) {
      *why = "masked arrays are not supported: pass the data of unmasked entries";
      return false;
    }
  }
  const int number = type.num();
  if (number == Npy::NPY_DOUBLE_) {
    v->format = kF64;
  } else if (number == Npy::NPY_FLOAT_) {
    v->format = kF32;
  } else if (number == 23) {  // NPY_HALF
    v->format = kF16;
  } else if (is_bfloat16(type)) {
    v->format = kBF16;
  } else if (integers && number == Npy::NPY_BYTE_) {
    v->format = kI8;
  } else if (integers && number == Npy::NPY_UBYTE_) {
    v->format = kU8;
  } else if (integers && number == Npy::NPY_SHORT_) {
    v->format = kI16;
  } else {
    *why = "expected float64, float32, float16 or bfloat16, got " + std::string(py::str(type));
    return false;
  }
  if (type.byteorder() != '=' && type.byteorder() != '|') {
    *why = "expected native byte order, got dtype " + std::string(py::str(type.attr("str")));
    return false;
  }
  *type_error = false;
  const int flags = a.flags();
  if (!(flags & Npy::NPY_ARRAY_ALIGNED_)) {
    *why = "the array is misaligned for its dtype";
    return false;
  }
  v->data = static_cast<char*>(const_cast<void*>(a.data()));
  v->ndim = int(a.ndim());
  static_assert(sizeof(py::ssize_t) == sizeof(int64_t), "64-bit platforms only");
  v->shape = reinterpret_cast<const int64_t*>(a.shape());
  v->stride = (flags & Npy::NPY_ARRAY_C_CONTIGUOUS_) ? nullptr : reinterpret_cast<const int64_t*>(a.strides());
  v->stride_in_bytes = true;
  v->read_only = !(flags & Npy::NPY_ARRAY_WRITEABLE_);
  for (int d = 0; v->stride && d < v->ndim; ++d)
    if (v->shape[d] > 1 && v->stride[d] % int64_t(size_of(v->format)) != 0) {
      *why = "strides are not multiples of the element size";
      return false;
    }
  return true;
}

struct Managed {  // DLManagedTensorVersioned up to its tensor
  uint32_t major, minor;
  void *context, *deleter;
  uint64_t flags;
  DLTensor tensor;
};

bool dlpack_view(py::handle object, std::vector<py::object>& keep, View* v, std::string* why) {
  for (const char* bit : {"is_neg", "is_conj"})  // torch's lazy views, which DLPack does not tell of
    if (py::hasattr(object, bit) && object.attr(bit)().cast<bool>()) {
      *why = "a lazily negated or conjugated view: resolve it first";
      return false;
    }
  const py::tuple place = object.attr("__dlpack_device__")();
  DLTensor there{};
  there.device_type = place[0].cast<int32_t>();
  there.device_id = place[1].cast<int32_t>();
  int device;
  if (!device_of(there, &device, why)) return false;
  const py::handle type = py::type::handle_of(object);
  py::dict ask;
  if (there.device_type == kDLCuda) {
    const DLPackExchangeAPI* api = exchange_api(type);
    if (api) {  // __dlpack__ refuses tensors that are not on the current device
      DLTensor t;
      Format format;
      if (object.attr("requires_grad").cast<bool>()) {
        *why = "it requires grad: pass its detach()";
        return false;
      }
      if (api->tensor_from_object(object.ptr(), &t) != 0) throw py::error_already_set();
      if (!format_of(t, &format) || format >= kFloats) {
        *why = "expected float64, float32, float16 or bfloat16 elements";
        return false;
      }
      *v = view_of(t, format, device);
      keep.push_back(py::reinterpret_borrow<py::object>(object));
      return true;
    }
    bool known;  // -1: no waiting, Batch sees to the streams that it knows; 1: the default one
    stream_of(type, device, &known);
    ask["stream"] = known ? -1 : 1;
  }
  py::object capsule;
  try {
    capsule = object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0), **ask);
  } catch (py::error_already_set& e) {
    if (!e.matches(PyExc_TypeError)) throw;
    capsule = object.attr("__dlpack__")(**ask);  // from before version 1
  }
  const DLTensor* t = nullptr;
  v->read_only = false;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* m = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (m->major != 1) {
      *why = "its DLPack version " + std::to_string(m->major) + " is not known here";
      return false;
    }
    t = &m->tensor;
    v->read_only = m->flags & 1;
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    t = static_cast<DLTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  } else {
    *why = "__dlpack__ returned no DLPack capsule";
    return false;
  }
  Format format;
  if (!format_of(*t, &format) || format >= kFloats) {
    *why = "expected float64, float32, float16 or bfloat16 elements";
    return false;
  }
  bool read_only = v->read_only;
  *v = view_of(*t, format, device);
  v->read_only = read_only;
  if (reinterpret_cast<uintptr_t>(v->data) % size_of(format) != 0) {
    *why = "the array is misaligned for its dtype";
    return false;
  }
  keep.push_back(std::move(capsule));
  return true;
}

// Merges dimensions that every operand can walk as one.
void simplify(Strided& s) {
  const int n = s.n;
  int out = 0;
  for (int d = 0; d < s.ndim; ++d) {
    bool merge = out > 0;
    for (int k = 0; k < n && merge; ++k) merge = s.stride[k][out - 1] == s.stride[k][d] * s.shape[d];
    int at = merge ? out - 1 : out++;
    s.shape[at] = merge ? s.shape[at] * s.shape[d] : s.shape[d];
    for (int k = 0; k < n; ++k) s.stride[k][at] = s.stride[k][d];
  }
  if (out == 0) {
    s.shape[out] = 1;
    for (int k = 0; k < n; ++k) s.stride[k][out] = 1;
    ++out;
  }
  s.ndim = out;
}

// Puts the dimensions into the order of an operand's strides, the largest first.
void order_by(Strided& s, int operand) {
  int order[kMaxDims];
  for (int d = 0; d < s.ndim; ++d) order[d] = d;
  std::stable_sort(order, order + s.ndim, [&](int a, int b) { return s.stride[operand][a] > s.stride[operand][b]; });
  const Strided was = s;
  for (int d = 0; d < s.ndim; ++d) {
    s.shape[d] = was.shape[order[d]];
    for (int k = 0; k < s.n; ++k) s.stride[k][d] = was.stride[k][order[d]];
  }
}

// Dimensions by growing stride: with no gap and no overlap, the product of the sizes below is each one's stride.
bool dense(const Strided& s, int operand) {
  int order[kMaxDims];
  for (int d = 0; d < s.ndim; ++d) order[d] = d;
  std::sort(order, order + s.ndim, [&](int a, int b) { return s.stride[operand][a] < s.stride[operand][b]; });
  int64_t expected = 1;
  for (int i = 0; i < s.ndim; ++i) {
    if (s.stride[operand][order[i]] != expected) return false;
    expected *= s.shape[order[i]];
  }
  return true;
}

}  // namespace

const DLPackExchangeAPI* exchange_api(py::handle type) {
  py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api && api->major != 1) api = api->previous;
  return api && api->tensor_from_object ? api : nullptr;
}

const DeviceTable* serving(int32_t device_type, std::string* why) {
  const DeviceTable* library = device_type == kDLCuda ? device_library(why) : open_device_library();
  return library && library->device_type == device_type ? library : nullptr;
}

bool device_of(const DLTensor& t, int* device, std::string* why) {
  *device = -1;
  if (t.device_type == kDLCudaHost) return true;
  if (const DeviceTable* library = serving(t.device_type, why)) {
    *device = library->number ? library->number(static_cast<const char*>(t.data) + t.byte_offset) : t.device_id;
    return true;
  }
  if (t.device_type == kDLCpu) return true;
  if (why && why->empty())
    *why = "expected an array on the CPU, got DLPack device type " + std::to_string(t.device_type);
  return false;
}

void* stream_of(py::handle type, int device, bool* known) {
  *known = true;
  const DeviceTable* library = open_device_library();
  if (!library) return nullptr;
  const DLPackExchangeAPI* api = library->streams ? exchange_api(type) : nullptr;
  void* stream = nullptr;
  if (api && api->current_stream) {
    if (api->current_stream(library->device_type, device, &stream) != 0) throw py::error_already_set();
    return stream;
  }
  const auto module = type.attr("__module__").cast<std::string>();
  if (module.rfind("torch", 0) == 0 && !library->streams) return nullptr;
  if (module.rfind("torch", 0) == 0)
    return reinterpret_cast<void*>(
        py::module_::import("torch.cuda").attr("current_stream")(device).attr("cuda_stream").cast<uintptr_t>());
  if (module.rfind("cupy", 0) == 0) {
    const py::object current = py::module_::import("cupy.cuda").attr("get_current_stream");
    py::object of_device;
    try {
      of_device = current(device);
    } catch (py::error_already_set& e) {
      if (!e.matches(PyExc_TypeError)) throw;
      of_device = current();  // from before streams were kept by device
    }
    return reinterpret_cast<void*>(of_device.attr("ptr").cast<uintptr_t>());
  }
  *known = false;
  return nullptr;
}

bool format_of(const DLTensor& t, Format* format) {
  if (t.lanes != 1) return false;
  if (t.code == kDLFloat && (t.bits == 64 || t.bits == 32 || t.bits == 16)) {
    *format = t.bits == 64 ? kF64 : t.bits == 32 ? kF32 : kF16;
    return true;
  }
  if (t.code == kDLInt && (t.bits == 16 || t.bits == 8)) {
    *format = t.bits == 16 ? kI16 : kI8;
    return true;
  }
  if (t.code == kDLUInt && t.bits == 8) {
    *format = kU8;
    return true;
  }
  *format = kBF16;
  return t.code == kDLBfloat && t.bits == 16;
}

bool try_view(py::handle object, bool integers, std::vector<py::object>& keep, View* v, std::string* why,
              bool* type_error) {
  *type_error = true;
  if (py::isinstance<py::array>(object)) {
    return numpy_view(py::reinterpret_borrow<py::array>(object), integers, v, why, type_error);
  }
  if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__")) {
    try {
      if (!dlpack_view(object, keep, v, why)) return false;
      if (v->data || v->size() == 0) return true;
      *why = "it has no memory";
      return false;
    } catch (py::error_already_set& e) {
      if (!e.matches(PyExc_Exception)) throw;
      *why = std::string(py::str(e.value()));
      return false;
    }
  }
  *why = "expected an array, got " + std::string(py::str(py::type::handle_of(object).attr("__name__")));
  return false;
}

void lay_out(const View* v, const Parts& parts, Tensor& tensor, std::vector<std::unique_ptr<Strided>>& layouts) {
  const int n = parts.count();
  tensor.span.param = v[0].data;
  tensor.span.grad = v[1].data;
  for (int k = 0; k < parts.states; ++k) tensor.span.state[k] = v[2 + k].data;
  tensor.span.residual = parts.residual ? v[2 + parts.states].data : nullptr;
  tensor.span.ema = parts.ema ? v[n - 1].data : nullptr;
  tensor.span.n = v[0].size();
  tensor.strided = nullptr;
  bool flat = true;
  for (int k = 0; k < n && flat; ++k) flat = v[k].contiguous();
  if (flat || tensor.span.n == 0) return;
  Strided s;
  s.n = n;
  s.ndim = 0;
  for (int d = 0; d < v[0].ndim; ++d) {  // at most 62: their product is a number of elements
    if (v[0].shape[d] == 1) continue;
    if (s.ndim == kMaxDims) throw std::length_error("an array has more elements than 64 bits count");
    s.shape[s.ndim] = v[0].shape[d];
    for (int k = 0; k < n; ++k) s.stride[k][s.ndim] = v[k].stride ? v[k].step(d) : 0;
    ++s.ndim;
  }
  for (int k = 0; k < n; ++k) {
    int64_t expected = 1;
    for (int d = s.ndim - 1; d >= 0 && !v[k].stride; --d) {
      s.stride[k][d] = expected;
      expected *= s.shape[d];
    }
  }
  // Blocks run along the memory of the codes, random numbers along that of the parameter.
  order_by(s, parts.states && v[2].format >= kFloats ? 2 : 0);
  simplify(s);
  bool alike = dense(s, 0);
  for (int k = 1; k < n && alike; ++k) alike = std::equal(s.stride[0], s.stride[0] + s.ndim, s.stride[k]);
  if (alike) return;
  layouts.push_back(std::make_unique<Strided>(s));
  tensor.strided = layouts.back().get();
}

bool overlaps_itself(const View& v) {
  if (v.contiguous() || v.size() == 0) return false;
  int order[kMaxDims], n = 0;
  for (int d = 0; d < v.ndim; ++d) {
    if (v.shape[d] == 1) continue;
    if (n == kMaxDims) return true;  // more elements than there can be
    order[n++] = d;
  }
  auto reach = [&](int d) { return v.step(d) < 0 ? -v.step(d) : v.step(d); };
  std::sort(order, order + n, [&](int a, int b) { return reach(a) < reach(b); });
  int64_t covered = 0;
  for (int i = 0; i < n; ++i) {
    if (reach(order[i]) <= covered) return true;
    covered += reach(order[i]) * (v.shape[order[i]] - 1);
  }
  return false;
}

Extent extent_of(const View& v, bool written, int row, int operand) {
  const int64_t item = int64_t(size_of(v.format));
  const int64_t n = v.size();
  if (n == 0) return {v.data, v.data, written, row, operand};
  if (v.contiguous()) return {v.data, v.data + n * item, written, row, operand};
  int64_t low = 0, high = 0;
  for (int d = 0; d < v.ndim; ++d) {
    int64_t far = v.step(d) * (v.shape[d] - 1);
    (far < 0 ? low : high) += far;
  }
  return {v.data + low * item, v.data + (high + 1) * item, written, row, operand};
}

std::vector<std::pair<Extent, Extent>> meetings(std::vector<Extent>& extents, size_t limit) {
  std::vector<std::pair<Extent, Extent>> found;
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.low < b.low; });
  const Extent *any = nullptr, *writer = nullptr;  // those that reach furthest so far
  for (const Extent& e : extents) {
    if (e.low == e.high) continue;
    bool meets = (writer && e.low < writer->high) || (e.written && any && e.low < any->high);
    if (meets && found.size() < limit)
      for (const Extent& other : extents) {
        if (&other == &e) break;
        if (other.low < other.high && e.low < other.high && (e.written || other.written) && found.size() < limit)
          found.emplace_back(other, e);
      }
    if (!any || e.high > any->high) any = &e;
    if (e.written && (!writer || e.high > writer->high)) writer = &e;
  }
  return found;
}

std::string shape_text(const View& v) {
  std::string s = "(";
  for (int d = 0; d < v.ndim; ++d) s += std::to_string(v.shape[d]) + (d + 1 < v.ndim ? ", " : v.ndim == 1 ? "," : "");
  return s + ")";
}

}  // namespace fusedopt
