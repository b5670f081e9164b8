// See torch_tensor.h.
#include "bindings/torch_tensor.h"

#include <vector>

namespace fusedopt {
namespace {

uint64_t word(uintptr_t memory, int offset) {
  uint64_t x;
  memcpy(&x, reinterpret_cast<const char*>(memory) + offset, 8);
  return x;
}

// The offset of the first word from `begin` to `end` that has this value; every sample has to give the same one.
bool find_word(uintptr_t memory, int begin, int end, uint64_t value, int* offset) {
  for (int at = begin; at + 8 <= end; at += 8)
    if (word(memory, at) == value) {
      const bool agrees = *offset < 0 || *offset == at;
      *offset = at;
      return agrees;
    }
  return false;
}

uintptr_t impl_of(const py::object& tensor) { return tensor.attr("_cdata").cast<uintptr_t>(); }
py::object storage_of(const py::object& tensor) { return tensor.attr("untyped_storage")(); }
uintptr_t address_of(const py::object& storage) { return storage.attr("_cdata").cast<uintptr_t>(); }

}  // namespace

const TorchLayout& TorchLayout::get(bool exchange) {
  static const TorchLayout unknown{};
  static const TorchLayout* const found = [] {
    auto* layout = new TorchLayout;
    try {
      layout->known_ = layout->find();
    } catch (const py::error_already_set&) {  // a torch that lacks one of the functions asked here
    }
    return layout;
  }();
  return exchange ? *found : unknown;
}

bool TorchLayout::find() {
  constexpr int kStorageBytes = 72;  // of a storage, at the least, in every torch with the exchange API
  const py::module_ torch = py::module_::import("torch");
  const py::object type = torch.attr("Tensor");
  const DLPackExchangeAPI* api = exchange_api(type);
  if (!api) return false;
  auto make = [&](py::object shape, const char* dtype = "float32") {
    return torch.attr("zeros")(shape, py::arg("dtype") = torch.attr(dtype), py::arg("device") = "cpu");
  };
  const int object_bytes = int(reinterpret_cast<PyTypeObject*>(type.ptr())->tp_basicsize);
  for (int64_t n : {1237, 4211, 3001}) {
    const py::object t = make(py::int_(n)).attr("narrow")(0, n / 3, n / 2), held = storage_of(t);
    const uintptr_t impl = impl_of(t), storage = address_of(held);
    DLTensor dl;
    if (api->tensor_from_object(t.ptr(), &dl) != 0) throw py::error_already_set();
    // torch has up to five sizes and strides within the implementation, their number before them, and four words
    // behind: the offset in the storage, the number of elements, dtype with device and flags, and the dispatch keys.
    shape_ = int(reinterpret_cast<uintptr_t>(dl.shape) - impl);
    if (shape_ < 24 || shape_ > 256 || dl.strides != dl.shape + kInline || word(impl, shape_ - 8) != 1) return false;
    offset_ = shape_ + 80;
    place_ = offset_ + 16;
    keys_ = offset_ + 24;
    if (word(impl, offset_) != uint64_t(n / 3) || word(impl, offset_ + 8) != uint64_t(n / 2) ||
        !find_word(reinterpret_cast<uintptr_t>(t.ptr()), 0, object_bytes, impl, &impl_) ||
        !find_word(impl, 8, shape_ - 8, storage, &storage_) ||
        !find_word(storage, 8, kStorageBytes - 8, held.attr("data_ptr")().cast<uintptr_t>(), &data_) ||
        !find_word(storage, data_ + 8, kStorageBytes - 8, uint64_t(4 * n), &bytes_))
      return false;
    flags_ = bytes_ + 8;
  }
  const py::object plain = make(py::int_(8));
  plain_keys_ = word(impl_of(plain), keys_);
  plain_place_ = word(impl_of(plain), place_);
  plain_flags_ = word(address_of(storage_of(plain)), flags_);
  // What differs among ordinary tensors may differ; anything else is to be as it is here.
  fixed_place_ = ~uint64_t(0xffff);  // the dtype is looked up
  fixed_flags_ = ~uint64_t(0) >> 8;  // seven flags of a byte, and padding
  const py::object image = make(py::make_tuple(2, 3, 4, 5)), square = make(py::make_tuple(6, 7));
  const std::vector<py::object> ordinary = {
      make(py::tuple()),
      make(py::int_(0)),
      plain.attr("narrow")(0, 2, 3),
      square.attr("t")(),
      square.attr("narrow")(1, 1, 3),
      make(py::int_(1)).attr("expand")(5),
      image.attr("contiguous")(py::arg("memory_format") = torch.attr("channels_last")),
      image.attr("permute")(3, 1, 0, 2),
      make(py::make_tuple(2, 2, 2, 2, 2)).attr("contiguous")(py::arg("memory_format") = torch.attr("channels_last_3d")),
      torch.attr("nn").attr("Parameter")(plain.attr("clone")()),
      torch.attr("from_numpy")(square.attr("clone")().attr("numpy")()),
      make(py::int_(8)).attr("share_memory_")(),
  };
  for (const py::object& t : ordinary) {
    if (word(impl_of(t), keys_) != plain_keys_) return false;
    fixed_place_ &= ~(word(impl_of(t), place_) ^ plain_place_);
    fixed_flags_ &= ~(word(address_of(storage_of(t)), flags_) ^ plain_flags_);
  }
  memset(formats_, -1, sizeof formats_);
  const char* const dtypes[] = {"float64", "float32", "bfloat16", "float16", "int16", "int8", "uint8"};
  static_assert(sizeof dtypes / sizeof *dtypes == kFormats, "in the order of Format");
  for (int f = 0; f < kFormats; ++f) {
    const uint64_t place = word(impl_of(make(py::int_(3), dtypes[f])), place_);
    if (uint16_t(place) >= kDtypes || formats_[uint16_t(place)] >= 0) return false;
    formats_[uint16_t(place)] = static_cast<signed char>(f);
  }
  // What must not be taken for ordinary has to look different.
  negative_ = word(impl_of(torch.attr("_neg_view")(plain)), keys_) ^ plain_keys_;
  const py::object lazy = torch.attr("_lazy_clone")(plain), meta = plain.attr("to")("meta");
  const uint64_t zero = word(impl_of(torch.attr("_efficientzerotensor")(8)), keys_);
  return negative_ != 0 && (negative_ & (negative_ - 1)) == 0 && zero != plain_keys_ &&
         word(impl_of(meta), keys_) != plain_keys_ && word(impl_of(plain.attr("to_sparse")()), keys_) != plain_keys_ &&
         ((word(address_of(storage_of(lazy)), flags_) ^ plain_flags_) & fixed_flags_) != 0;
}

}  // namespace fusedopt
