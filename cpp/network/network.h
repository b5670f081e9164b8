// Losses and layers of a network over arrays: the table of loops that each instruction set provides, and the functions
// that split arrays into blocks, run them on threads and add partial sums in a fixed order. The loops are in losses.h
// and layers.h. Formats: f64 and f32.
#pragma once
#include <stdint.h>

#include "rules/types.h"

namespace fusedopt {

constexpr int kNumbers = 2;            // kF64, kF32
constexpr int64_t kLossBlock = 4096;   // elements per partial sum of losses
constexpr int64_t kColumnBlock = 256;  // rows per partial sum of columns
constexpr int64_t kLossTile = 512;
constexpr int64_t kProductLanes = 8;  // partial sums of a product

// The values that targets may have.
enum Targets : int { kAnyTarget, kZeroToOne, kPlusMinusOne, kNotNegative };
enum Activation : int { kIdentity, kRelu, kTanh, kLogistic, kGelu, kActivations };

// A range of elements that starts at `begin`; element i of the array has weight[i / per_weight].
struct LossSpan {
  const void *prediction, *target, *weight;
  void *value, *gradient;  // value may be null
  int64_t begin, n, per_weight;
  double parameter, scale;  // scale multiplies the gradient
};

struct ElementLoss {
  const char* name;
  Targets targets;
  double (*run[kNumbers])(const LossSpan&);  // the sum of weight * loss
};

// Rows of logits. The target of row i is the class labels[i], or the distribution targets[i, :].
struct SoftmaxSpan {
  const void* logits;
  const int64_t* labels;
  const void *targets, *class_weight, *weight;  // the last two may be null
  void *value, *gradient;                       // value may be null
  int64_t rows, columns;
  double smoothing, scale;
};

// The penalty l1 |w| + l2 w^2 / 2; its gradient times `scale` is added to `gradient` where there is one.
struct PenaltySpan {
  const void* weights;
  void* gradient;
  int64_t n;
  double l1, l2, scale;
};

struct DropoutKey {
  uint32_t low, high, threshold;  // an element is dropped where its random number is below the threshold
  double scale;
};

// Contiguous rows of a layer; `sums` receives sums over these rows, one per column.
struct LayerSpan {
  const void *in, *other;
  void *out, *more;
  double* sums;
  const void *a, *b, *c, *d;  // one number per column
  int64_t rows, columns;
};

// Products of the rows of a small batch with few weights. Rows of x and of w have `width` elements, a multiple of
// kProductLanes: the last may be padding, zeros in both.
struct ProductSpan {
  const void* x;
  int64_t rows, width, outputs;
};

struct NetworkTable {
  const ElementLoss* losses;
  int n_losses;
  int64_t (*unfit[kNumbers])(const void* target, int64_t n, Targets targets);  // how many values are not allowed
  double (*softmax[kNumbers])(const SoftmaxSpan&);
  double (*penalty[kNumbers])(const PenaltySpan&);
  void (*dropout[kNumbers])(const void* x, void* y, int64_t begin, int64_t n, const DropoutKey&);
  // more = in + a, out = activation(more); `more` only where backward needs it (gelu), else null
  void (*forward[kActivations][kNumbers])(const LayerSpan&);
  // out *= the activation's slope at in (its output; gelu: its input), and the sums of out
  void (*backward[kActivations][kNumbers])(const LayerSpan&);
  void (*column_sums[kNumbers])(const LayerSpan&);     // of in
  void (*column_squares[kNumbers])(const LayerSpan&);  // of (in - a)^2
  void (*normalize[kNumbers])(const LayerSpan&);       // more = (in - a) b, out = more c + d
  void (*normal_sums[kNumbers])(const LayerSpan&);     // of in, then of in * other
  void (*normal_back[kNumbers])(const LayerSpan&);     // out = a (in - b - other c)
  // out[row, output] = sum over columns of x[row, column] w[output, column]
  void (*products[kNumbers])(const ProductSpan&, const void* w, void* out);
  // out[output, column] = sum over rows of x[row, column] delta[row, output]
  void (*products_back[kNumbers])(const ProductSpan&, const void* delta, void* out);
};

// The table of the instruction set in use.
const NetworkTable& network_table();

// The sum of all losses. Bits do not depend on the number of threads, here and below.
double run_loss(int loss, Format f, const LossSpan& whole, int threads);
double run_softmax(Format f, const SoftmaxSpan& whole, int threads);
double run_penalty(Format f, const PenaltySpan& whole, int threads);
int64_t count_unfit(Format f, const void* target, int64_t n, Targets targets, int threads);
void run_dropout(Format f, const void* x, void* y, int64_t n, const DropoutKey& key, int threads);

using LayerLoop = void (*)(const LayerSpan&);
// Calls the loop for blocks of rows; with `sums_per_column` > 0 it adds the columns into whole.sums.
void run_layer(LayerLoop loop, Format f, const LayerSpan& whole, int sums_per_column, int threads);

}  // namespace fusedopt
