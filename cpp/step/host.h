// The tensors of a step that are in the host's memory, as one flat range that is split evenly among threads.
#pragma once
#include <functional>
#include <vector>

#include "step/tensor.h"
#include "step/threads.h"

namespace fusedopt {

// A tensor's sums for rules with reductions, and its length.
constexpr int kSumRow = kMaxSums + 1;

// Completes the sums of tensors of which this process has only a part. It is called after each pass of the reductions
// with the tensors that have sums in this pass and a row of kSumRow numbers for each: the new sums, after the first
// pass the length, and zeros elsewhere.
using CompleteSums = std::function<void(const std::vector<size_t>& tensors, double* rows)>;

class HostStep {
 public:
  std::vector<Tensor> tensors;

  // Advances the clock of every tensor.
  void advance(const std::vector<Group>& groups);
  // The norm of the gradients before unscaling.
  double norm(Team team, int threads);
  // Updates all tensors, whose clocks have been advanced; gradients are multiplied by `factor`.
  void update(const std::vector<Group>& groups, double factor, Team team, int threads, const CompleteSums& complete);

 private:
  struct Work;
  int64_t split(int64_t grain, int threads, int* parts);
  // Computes the sums that rules with reductions need.
  void reduce(const std::vector<Group>& groups, Team team, int threads, const CompleteSums& complete);
  void complete_pass(int pass, const CompleteSums& complete);

  std::vector<int64_t> begin_;   // the tensors' first positions in the flat range, and its end
  std::vector<double> partial_;  // leaves of the norm
  std::vector<double> scale_;    // by group
  std::vector<double> sums_;     // a row of kSumRow for every tensor; empty if no rule has reductions
};

}  // namespace fusedopt
