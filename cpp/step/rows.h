// The step over tables with sparse gradients: an index and a row of values per lookup. The lookups of all tables are
// sorted by row; then the kernels update each row that occurs, once. Other rows are not accessed.
#pragma once
#include <memory>
#include <stdexcept>
#include <vector>

#include "step/tensor.h"
#include "step/threads.h"

namespace fusedopt {

// An index out of the range of its table.
struct BadIndex : std::out_of_range {
  size_t table;  // as counted by Step::add
  int64_t position, index;
  BadIndex(size_t t, int64_t p, int64_t i) : std::out_of_range("an index is no row"), table(t), position(p), index(i) {}
};

// A buffer that grows on demand and is kept between steps. Growing discards the contents.
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

  // Sorts the lookups by row; the sort is stable. Throws BadIndex for the first index out of range, and length_error if
  // row and position do not fit in 64 bits. Call it before the other functions.
  void group(Team team, int threads);
  // As in HostStep. The gradient of a row is the sum of its values, in the order of the lookups. A row that counts its
  // own steps advances its count in update().
  void advance(const std::vector<Group>& groups);
  double norm(Team team, int threads);
  void update(const std::vector<Group>& groups, double factor, Team team, int threads);

 private:
  struct Grouping;
  struct Work;
  void split(int threads, int* parts) const;

  std::vector<int64_t> first_;   // the first lookup of each table; then the number of lookups
  std::vector<uint64_t> base_;   // the first row of each table, counted over all tables; then the number of rows
  std::vector<int64_t> bucket_;  // the first lookup of each bucket of equal leading bits
  Scratch sorted_, other_;       // words: row << position_bits_ | position; 16 bytes per lookup
  int position_bits_ = 0;
};

}  // namespace fusedopt
