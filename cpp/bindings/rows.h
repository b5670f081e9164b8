// Gradients by rows, given as an array of indices and an array of values: checks them and fills Lookups.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "bindings/arrays.h"

namespace fusedopt {

// Borrowed, as View is.
struct IndexView {
  const char* data;
  bool wide;        // int64, else int32
  int64_t n, step;  // step: in elements
};

// Views an array of indices; `keep` receives the objects that must outlive the view. Returns false on failure and sets
// `why` and `type_error` as try_view does.
bool try_indices(py::handle object, std::vector<py::object>& keep, IndexView* v, std::string* why, bool* type_error);

// Fills the span and the rows of `tensor` from its operands. The gradient has one row of values per index. `all` owns
// the Lookups. Returns an empty string, or the error and the operand that caused it.
std::string lay_out_rows(const View* operands, const Parts& parts, bool quantised, const IndexView& indices,
                         Tensor& tensor, std::vector<std::unique_ptr<Lookups>>& all, int* operand);

}  // namespace fusedopt
