// What the bindings know of the memory of torch's tensors: where a tensor's Python object points to its implementation,
// where that has shape, strides, dtype, device and dispatch keys, and where the storage has its bytes. A tensor read in
// this way costs 5 ns, by DLPack's exchange API 46. The offsets are found at run time, on tensors made for the purpose,
// and a tensor is read only if all that is not understood of it is as in those; DLPack reads the others.
//
// Every pointer is read from an object that the caller keeps alive, with the GIL held, and none is kept for a later
// step: `set_`, `resize_`, `share_memory_` and `swap_tensors` change what a tensor points to, and free what was there.
#pragma once
#include <pybind11/pybind11.h>
#include <string.h>

#include "bindings/arrays.h"

namespace fusedopt {

class TorchLayout {
 public:
  // That of the torch that is loaded, or an unknown one. Call with the GIL held.
  static const TorchLayout& get(bool exchange);

  bool known() const { return known_; }

  // The view of a strided tensor in the host's memory; false where something about the tensor is out of the ordinary.
  bool read(PyObject* tensor, View* v) const {
    const void* at = impl(tensor);
    const auto place = load<uint64_t>(at, place_);
    const auto dtype = uint16_t(place);
    const auto ndim = load<uint64_t>(at, shape_ - 8);
    if (load<uint64_t>(at, keys_) != plain_keys_ || ((place ^ plain_place_) & fixed_place_) != 0 || dtype >= kDtypes ||
        formats_[dtype] < 0 || ndim > kInline)
      return false;
    const void* from = storage(at);
    if (((load<uint64_t>(from, flags_) ^ plain_flags_) & fixed_flags_) != 0) return false;
    const auto format = Format(formats_[dtype]);
    auto* data = load<char*>(from, data_);
    auto* shape = reinterpret_cast<const int64_t*>(static_cast<const char*>(at) + shape_);
    if (data) data += load<int64_t>(at, offset_) * int64_t(size_of(format));
    *v = {data, format, int(ndim), shape, shape + kInline, false, false, -1};
    return true;
  }
  // The memory of a live tensor's storage.
  const char* data(PyObject* tensor) const { return load<const char*>(storage(impl(tensor)), data_); }
  size_t bytes(PyObject* tensor) const { return load<size_t>(storage(impl(tensor)), bytes_); }
  bool negative(PyObject* tensor) const { return (load<uint64_t>(impl(tensor), keys_) & negative_) != 0; }

  // Prefetches, each of what the one before has brought into the cache.
  void prefetch_impl(PyObject* tensor) const {
    const void* at = impl(tensor);
    for (int n = 0; n < 3; ++n) prefetch(line(at, n));
  }
  void prefetch_storage(PyObject* tensor) const { prefetch(storage(impl(tensor))); }
  // And what autograd keeps of a parameter: torch's pointers to it follow the one to the storage.
  void prefetch_linked(PyObject* tensor) const {
    const void* at = impl(tensor);
    for (int offset = storage_; offset < shape_ - 8; offset += 8) prefetch(load<const void*>(at, offset));
  }

 private:
  static constexpr uint64_t kInline = 5;  // dimensions whose sizes and strides are within the implementation
  static constexpr int kDtypes = 64;

  TorchLayout() = default;
  bool find();
  const void* impl(PyObject* tensor) const { return load<const void*>(tensor, impl_); }
  const void* storage(const void* impl) const { return load<const void*>(impl, storage_); }
  template <class T>
  static T load(const void* at, int offset) {
    T x;
    memcpy(&x, static_cast<const char*>(at) + offset, sizeof x);
    return x;
  }

  bool known_ = false;
  int impl_ = -1;                                                         // in the Python object
  int storage_ = -1, shape_ = -1, offset_ = -1, place_ = -1, keys_ = -1;  // in the implementation
  int data_ = -1, bytes_ = -1, flags_ = -1;                               // in the storage
  uint64_t negative_ = 0, plain_keys_ = 0;                                // dispatch keys
  uint64_t plain_place_ = 0, fixed_place_ = 0;                            // dtype, device, flags
  uint64_t plain_flags_ = 0, fixed_flags_ = 0;                            // of the storage
  signed char formats_[kDtypes] = {};                                     // by torch's number of a dtype
};

}  // namespace fusedopt
