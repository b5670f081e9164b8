// The tensors of a step that are in the host's memory, as one flat range that is split evenly among threads.
#pragma once
#include <vector>

#include "step/tensor.h"
#include "step/threads.h"

namespace fusedopt {

class HostStep {
 public:
  std::vector<Tensor> tensors;

  // Advances the clock of every tensor.
  void advance(const std::vector<Group>& groups);
  // The norm of the gradients before unscaling.
  double norm(Team team, int threads);
  // Updates all tensors, whose clocks have been advanced; gradients are multiplied by `factor`.
  void update(const std::vector<Group>& groups, double factor, Team team, int threads);

 private:
  struct Work;
  int64_t split(int64_t grain, int threads, int* parts);
  // Computes the sums that rules with reductions need.
  void reduce(const std::vector<Group>& groups, Team team, int threads);

  std::vector<int64_t> begin_;   // the tensors' first positions in the flat range, and its end
  std::vector<double> partial_;  // leaves of the norm
  std::vector<double> scale_;    // by group
  std::vector<double> sums_;     // of every tensor, kMaxSums each, for rules with reductions
};

}  // namespace fusedopt
