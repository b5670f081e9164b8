// One epoch of a linear model with few weights: every batch with its products, loss, penalties and optimizer step.
// Larger models and other networks call BLAS and the step once a batch, from Python.
#pragma once
#include "network/network.h"
#include "step/step.h"

namespace fusedopt {

struct LinearEpoch {
  const void *x, *y, *weight;  // n rows by features (if sparse, the values), n rows by outputs, n or nullptr
  // nullptr: x is dense. Else row i has the values from begins[i] to begins[i + 1] in these columns; values of one
  // element are added. Both are int64 if `wide`, else int32.
  const void *columns, *begins;
  bool wide;
  const int64_t* order;  // the rows in the order of training, or nullptr
  int64_t n, features, outputs, batch;
  void *params, *grads;  // features by outputs weights, then the intercepts
  bool intercepts;       // whether they are trained
  int loss;
  double parameter;
  double divisor;  // of the reported loss
  double l1, l2;   // penalties of a row's weight, or of the batch's if `per_row`
  bool per_row;
  double proximal;      // if > 0: l1 by soft thresholding after the step, by this times the rate times l1
  const double* rates;  // of every step, at least as many as there are batches
  double max_norm;
  void* mean;  // nullptr, or as params: after step k it moves by follow[k] (params - mean)
  const double* follow;
};

struct EpochResult {
  double loss = 0, weight = 0;  // sum of the batches' losses times their weights, and of the weights
  int64_t steps = 0;
  double last_loss = 0;  // not finite: the epoch ended before this batch's step
  double norm = -1;      // of the last gradient, if it was clipped
};

// `step` has one tensor, params with grads, and one group. Bits do not depend on the instruction set.
EpochResult run_linear_epoch(Format f, const LinearEpoch& epoch, Step& step);

}  // namespace fusedopt
