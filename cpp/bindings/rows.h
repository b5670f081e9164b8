// Gradients that name rows of a parameter, given as two arrays: which indices and values are taken, and how they become
// Lookups.
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

// The view of an array of indices; `keep` receives what must outlive it. On failure false, `why` and `type_error` as
// try_view's.
bool try_indices(py::handle object, std::vector<py::object>& keep, IndexView* v, std::string* why, bool* type_error);

// Fills span and rows of `tensor` from its operands, of which the gradient's values have a row for each index instead
// of the parameter's shape. `all` owns the Lookups. Returns why not, and which operand is the reason.
std::string lay_out_rows(const View* operands, const Parts& parts, bool quantised, const IndexView& indices,
                         Tensor& tensor, std::vector<std::unique_ptr<Lookups>>& all, int* operand);

}  // namespace fusedopt
