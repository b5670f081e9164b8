// See rows.h.
#include "bindings/rows.h"

#include <pybind11/numpy.h>

#include "cpu/dispatch.h"

namespace fusedopt {
namespace {

// The number of elements of one row, or -1 if rows are not contiguous.
int64_t contiguous_row(const View& v) {
  int64_t n = 1;
  for (int d = v.ndim - 1; d > 0; --d) {
    if (v.stride && v.shape[d] != 1 && v.step(d) != n) return -1;
    n *= v.shape[d];
  }
  return n;
}

int64_t row_size(const View& v) {
  int64_t n = 1;
  for (int d = 1; d < v.ndim; ++d) n *= v.shape[d];
  return n;
}

}  // namespace

bool try_indices(py::handle object, std::vector<py::object>& keep, IndexView* v, std::string* why, bool* type_error) {
  *type_error = true;
  py::object held = py::reinterpret_borrow<py::object>(object);
  if (!py::isinstance<py::array>(object)) {
    if (!py::hasattr(object, "__dlpack__")) {
      *why = "expected an array of int32 or int64, got " +
             std::string(py::str(py::type::handle_of(object).attr("__name__")));
      return false;
    }
    try {
      held = py::module_::import("numpy").attr("from_dlpack")(object);
    } catch (py::error_already_set& e) {
      if (!e.matches(PyExc_Exception)) throw;
      *why = std::string(py::str(e.value()));
      return false;
    }
    keep.push_back(held);
  }
  const auto a = py::reinterpret_borrow<py::array>(held);
  const py::dtype type = a.dtype();
  if (type.kind() != 'i' || (type.itemsize() != 4 && type.itemsize() != 8) || type.byteorder() != '=') {
    *why = "expected int32 or int64, got " + std::string(py::str(type.attr("str")));
    return false;
  }
  *type_error = false;
  const auto item = int64_t(type.itemsize());
  if (a.ndim() != 1) {
    *why = "expected one dimension, got " + std::to_string(a.ndim());
    return false;
  }
  if (reinterpret_cast<uintptr_t>(a.data()) % size_t(item) != 0 || (a.shape(0) > 1 && a.strides(0) % item != 0)) {
    *why = "the array is misaligned for its dtype";
    return false;
  }
  *v = {static_cast<const char*>(a.data()), item == 8, int64_t(a.shape(0)), int64_t(a.strides(0)) / item};
  return true;
}

std::string lay_out_rows(const View* v, const Parts& parts, bool quantised, const IndexView& indices, Tensor& tensor,
                         std::vector<std::unique_ptr<Lookups>>& all, int* operand) {
  *operand = 0;
  if (v[0].ndim == 0) return "a number has no rows";
  if (host_kernel(tensor.kernel).reduction) return "a rule with sums over the tensor cannot be updated by rows";
  auto rows = std::make_unique<Lookups>();
  rows->indices = indices.data;
  rows->wide = indices.wide;
  rows->index_stride = indices.step;
  rows->n = indices.n;
  rows->rows = v[0].shape[0];
  rows->width = row_size(v[0]);
  *operand = 1;
  bool alike = v[1].ndim == v[0].ndim && v[1].shape[0] == indices.n;
  for (int d = 1; alike && d < v[0].ndim; ++d) alike = v[1].shape[d] == v[0].shape[d];
  if (!alike) {
    std::string shape = "(" + std::to_string(indices.n);
    for (int d = 1; d < v[0].ndim; ++d) shape += ", " + std::to_string(v[0].shape[d]);
    return "expected shape " + shape + (v[0].ndim == 1 ? ",)" : ")") + ", a row for each index, got " +
           shape_text(v[1]);
  }
  for (int o = 0; o < parts.count(); ++o) {
    *operand = o;
    rows->stride[o] = v[o].stride ? v[o].step(0) : rows->width;
    if (rows->width == 0 || contiguous_row(v[o]) >= 0) continue;
    if (o != 1) return "expected rows that are contiguous in memory";
    for (int d = 1; d < v[1].ndim; ++d) {
      rows->inner_shape.push_back(v[1].shape[d]);
      rows->inner_stride.push_back(v[1].step(d));
    }
  }
  for (int k = 0; quantised && k < parts.states; ++k) {
    *operand = 2 + k;
    if (rows->width % kBlock != 0 || rows->stride[2 + k] != rows->width)
      return "int8 states of a parameter that is updated by rows are for rows of whole blocks, a multiple of " +
             std::to_string(kBlock) + " elements, and these have " + std::to_string(rows->width);
  }
  tensor.span.param = v[0].data;
  tensor.span.grad = v[1].data;
  for (int k = 0; k < parts.states; ++k) tensor.span.state[k] = v[2 + k].data;
  tensor.span.residual = parts.residual ? v[2 + parts.states].data : nullptr;
  tensor.span.ema = parts.ema ? v[parts.count() - 1].data : nullptr;
  tensor.span.n = v[0].size();
  tensor.strided = nullptr;
  tensor.rows = rows.get();
  all.push_back(std::move(rows));
  return "";
}

}  // namespace fusedopt
