// One door for every array: pointer, shape, strides, format. NumPy arrays come by NumPy's own fields, torch tensors by
// DLPack's exchange API (no libtorch), anything else by __dlpack__. Here too: how the views of one tensor's operands
// become a Tensor, and whether memory overlaps.
#pragma once
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "step/step.h"

namespace fusedopt {

namespace py = pybind11;

// Borrowed: valid while the object it was taken from lives and keeps its storage.
struct View {
  char* data;
  Format format;
  int ndim;
  const int64_t* shape;
  const int64_t* stride;  // nullptr: C-contiguous
  bool stride_in_bytes;
  bool read_only;
  int device = -1;  // the number of the open device library's device on which it lies, or the CPU

  int64_t step(int d) const { return stride_in_bytes ? stride[d] / int64_t(size_of(format)) : stride[d]; }
  int64_t size() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  bool contiguous() const {
    if (!stride) return true;
    int64_t expected = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      if (shape[d] == 0) return true;
      if (shape[d] != 1 && step(d) != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
  bool same_shape(const View& other) const {
    if (ndim != other.ndim) return false;
    for (int d = 0; d < ndim; ++d)
      if (shape[d] != other.shape[d]) return false;
    return true;
  }
};

// The view of any array-like of floats, or NumPy array of small integers too; `keep` receives what must outlive it.
// Throws TypeError or ValueError whose message begins with `name()`.
template <class Name>
View view_of(py::handle object, std::vector<py::object>& keep, const Name& name, bool integers = false);

// Where an operand lies in memory, and whether it is written.
struct Extent {
  const char *low, *high;
  bool written;
  int row, operand;
};

// Which operands a tensor has, beside param and grad; in this order.
struct Parts {
  int states;
  bool residual, ema;
  int count() const { return 2 + states + residual + ema; }
};

// Fills span, strided of `tensor` from its operands, all of one shape. `layouts` owns what one that is not dense needs.
void lay_out(const View* operands, const Parts& parts, Tensor& tensor, std::vector<std::unique_ptr<Strided>>& layouts);

// Can two of its own elements share memory?
bool overlaps_itself(const View& v);
Extent extent_of(const View& v, bool written, int row, int operand);

// Pairs of extents that meet, at least one of them written; sorts `extents`. At most `limit` pairs.
std::vector<std::pair<Extent, Extent>> meetings(std::vector<Extent>& extents, size_t limit);

std::string shape_text(const View& v);

// --- DLPack, as the specification lays it out (https://dmlc.github.io/dlpack) ---
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void* allocator;
  void* managed_from_object;
  void* object_from_managed;
  int (*tensor_from_object)(void* object, DLTensor* out);  // borrows; 0 on success, else a Python error is set
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);  // likewise
};

constexpr int32_t kDLCpu = 1, kDLCuda = 2, kDLCudaHost = 3;  // the last: pinned memory of the host
constexpr uint8_t kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4;

// The device library that serves arrays of this DLPack device type, or nullptr. Host memory alone opens no library.
const DeviceTable* serving(int32_t device_type, std::string* why = nullptr);
// The exchange API of a type, or nullptr.
const DLPackExchangeAPI* exchange_api(py::handle type);
// Where a tensor lies as View says it; false where it is neither the CPU nor served by a library. `why` says more.
bool device_of(const DLTensor& t, int* device, std::string* why = nullptr);
// The stream on which the library that a type of arrays belongs to works; `known` is false where only the default one
// can be meant.
void* stream_of(py::handle type, int device, bool* known);
// False where the element type is none of ours.
bool format_of(const DLTensor& t, Format* format);
inline View view_of(const DLTensor& t, Format format, int device) {
  return {static_cast<char*>(t.data) + t.byte_offset, format, t.ndim, t.shape, t.strides, false, false, device};
}

// The implementation behind view_of: `why` receives a message without the name; returns false on failure, with
// `type_error` telling which exception fits.
bool try_view(py::handle object, bool integers, std::vector<py::object>& keep, View* view, std::string* why,
              bool* type_error);

template <class Name>
View view_of(py::handle object, std::vector<py::object>& keep, const Name& name, bool integers) {
  View v{};
  std::string why;
  bool type_error = true;
  if (try_view(object, integers, keep, &v, &why, &type_error)) return v;
  std::string message = name() + ": " + why;
  if (type_error) throw py::type_error(message);
  throw py::value_error(message);
}

}  // namespace fusedopt
