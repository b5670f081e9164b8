// Tables whose gradient names rows: indices, and a row of values for each. Lookups of all tables are sorted by row,
// then the kernels run over the rows that occur, each row once; rows without a gradient are not read.
#pragma once
#include <memory>
#include <stdexcept>
#include <vector>

#include "step/tensor.h"
#include "step/threads.h"

namespace fusedopt {

// An index that is no row of its table.
struct BadIndex : std::out_of_range {
  size_t table;  // as counted by Step::add
  int64_t position, index;
  BadIndex(size_t t, int64_t p, int64_t i) : std::out_of_range("an index is no row"), table(t), position(p), index(i) {}
};

// A stretch of memory that is kept and grows to what is asked for; its contents are not.
class Scratch {
 public:
  uint64_t* get(size_t words) {
    if (words > words_) {
      memory_.reset();
      memory_.reset(new uint64_t[words]);
      words_ = words;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<uint64_t[]> memory_;
  size_t words_ = 0;
};

class RowStep {
 public:
  std::vector<Tensor> tensors;  // each with `rows`

  // Sorts the lookups by row, those of one row in the order in which they stand. Throws BadIndex for the first that is
  // out of range, and length_error for more lookups than 64 bits tell apart. To be called before the others.
  void group(Team team, int threads);
  // As HostStep's. The gradient of a row is the sum of its values, added up in their order.
  void advance(const std::vector<Group>& groups);
  double norm(Team team, int threads);
  void update(const std::vector<Group>& groups, double factor, Team team, int threads);

 private:
  struct Grouping;
  struct Work;
  void split(int threads, int* parts) const;

  std::vector<int64_t> first_;   // of each table its first lookup among all; and their number
  std::vector<uint64_t> base_;   // of each table its first row among all; and their number
  std::vector<int64_t> bucket_;  // where lookups of equal leading bits begin
  Scratch sorted_, other_;       // row << position_bits_ | position; 16 bytes a lookup
  int position_bits_ = 0;
};

}  // namespace fusedopt
