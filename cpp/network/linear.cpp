// See linear.h.
#include "network/linear.h"

#include <math.h>

#include <algorithm>
#include <vector>

#include "cpu/float_mode.h"

namespace fusedopt {
namespace {

template <class T>
class Epoch {
 public:
  Epoch(Format f, const LinearEpoch& e, Step& step) : f_(f), e_(e), step_(step) {
    width_ = (e.features + kProductLanes - 1) / kProductLanes * kProductLanes;
    const int64_t rows = std::min(e.batch, e.n);
    x_.resize(size_t(rows * width_));  // zeros, which the padding stays
    y_.resize(size_t(rows * e.outputs));
    z_.resize(y_.size());
    delta_.resize(y_.size());
    weight_.resize(size_t(e.weight ? rows : 0));
    w_.resize(size_t(e.outputs * width_));
    w_grad_.resize(w_.size());
    sums_.resize(size_t(e.outputs));
  }

  EpochResult run() {
    for (int64_t begin = 0; begin < e_.n; begin += e_.batch) {
      const int64_t rows = std::min(e_.batch, e_.n - begin);
      const double weight = gather(begin, rows);
      if (weight <= 0) continue;
      const double loss = loss_and_gradient(rows, weight);
      result_.last_loss = loss;
      if (!(fabs(loss) < HUGE_VAL)) break;
      const double rate = e_.rates[result_.steps];
      step_.groups[0].hyper[0] = rate;
      result_.norm = step_.run({1, e_.max_norm}, Team::kOurs, 1);
      if (e_.proximal > 0 && e_.l1 > 0) shrink(T(rate * e_.l1 * factor(weight) * e_.proximal));
      if (e_.mean) follow(T(e_.follow[result_.steps]));
      ++result_.steps;
      result_.loss += loss * weight;
      result_.weight += weight;
    }
    return result_;
  }

 private:
  T* params() const { return static_cast<T*>(e_.params); }
  T* grads() const { return static_cast<T*>(e_.grads); }
  int64_t n_weights() const { return e_.features * e_.outputs; }
  double factor(double weight) const { return e_.per_row ? 1 / weight : 1; }

  // Copies the rows of a batch; returns their weight.
  double gather(int64_t begin, int64_t rows) {
    auto *x = static_cast<const T*>(e_.x), *y = static_cast<const T*>(e_.y), *w = static_cast<const T*>(e_.weight);
    double weight = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = e_.order ? e_.order[begin + r] : begin + r;
      T* to = x_.data() + r * width_;
      if (!e_.columns)
        std::copy_n(x + row * e_.features, e_.features, to);
      else if (e_.wide)
        scatter<int64_t>(row, to);
      else
        scatter<int32_t>(row, to);
      std::copy_n(y + row * e_.outputs, e_.outputs, y_.data() + r * e_.outputs);
      if (w) weight += double(weight_[size_t(r)] = w[row]);
    }
    return w ? weight : double(rows);
  }

  template <class I>
  void scatter(int64_t row, T* to) const {
    auto* x = static_cast<const T*>(e_.x);
    auto *columns = static_cast<const I*>(e_.columns), *begins = static_cast<const I*>(e_.begins);
    std::fill_n(to, e_.features, T(0));
    for (I i = begins[row]; i < begins[row + 1]; ++i) to[columns[i]] += x[i];
  }

  // The batch's loss with penalties; writes the gradient.
  double loss_and_gradient(int64_t rows, double weight) {
    const NetworkTable& t = network_table();
    const int64_t outputs = e_.outputs, features = e_.features;
    T *w = params(), *g = grads(), *bias = w + n_weights(), *bias_grad = g + n_weights();
    for (int64_t c = 0; c < features; ++c)
      for (int64_t o = 0; o < outputs; ++o) w_[size_t(o * width_ + c)] = w[c * outputs + o];
    const ProductSpan span{x_.data(), rows, width_, outputs};
    t.products[f_](span, w_.data(), z_.data());
    LayerSpan layer{};
    layer.in = layer.out = z_.data();
    layer.a = bias;
    layer.rows = rows;
    layer.columns = outputs;
    run_layer(t.forward[kIdentity][f_], f_, layer, 0, 1);
    const double scale = 1 / weight;
    const LossSpan loss{z_.data(),      y_.data(),     e_.weight ? weight_.data() : nullptr,
                        nullptr,        delta_.data(), 0,
                        rows * outputs, outputs,       e_.parameter,
                        scale};
    const double value = run_loss(e_.loss, f_, loss, 1) * scale / e_.divisor;
    if (e_.intercepts) {
      layer.in = delta_.data();
      layer.sums = sums_.data();
      run_layer(t.column_sums[f_], f_, layer, 1, 1);
      for (int64_t o = 0; o < outputs; ++o) bias_grad[o] = T(sums_[size_t(o)]);
    }
    t.products_back[f_](span, delta_.data(), w_grad_.data());
    for (int64_t c = 0; c < features; ++c)
      for (int64_t o = 0; o < outputs; ++o) g[c * outputs + o] = w_grad_[size_t(o * width_ + c)];
    if (!(e_.l1 > 0 || e_.l2 > 0)) return value;
    const double by = factor(weight), l1 = e_.proximal > 0 ? 0 : e_.l1;
    double penalty = by * run_penalty(f_, {w, g, n_weights(), l1, e_.l2, by}, 1);
    if (l1 != e_.l1) penalty += by * run_penalty(f_, {w, nullptr, n_weights(), e_.l1, 0, 0}, 1);
    return value + penalty;
  }

  void shrink(T by) {
    T* w = params();
    for (int64_t i = 0; i < n_weights(); ++i) w[i] -= std::min(std::max(w[i], -by), by);
  }

  void follow(T part) {
    T *p = params(), *mean = static_cast<T*>(e_.mean);
    for (int64_t i = 0; i < n_weights() + e_.outputs; ++i) mean[i] += (p[i] - mean[i]) * part;
  }

  const Format f_;
  const LinearEpoch& e_;
  Step& step_;
  int64_t width_;                              // of padded rows
  std::vector<T> x_, y_, z_, delta_, weight_;  // of a batch
  std::vector<T> w_, w_grad_;                  // outputs by width
  std::vector<double> sums_;
  EpochResult result_;
};

}  // namespace

EpochResult run_linear_epoch(Format f, const LinearEpoch& epoch, Step& step) {
  FloatMode mode;
  return f == kF64 ? Epoch<double>(f, epoch, step).run() : Epoch<float>(f, epoch, step).run();
}

}  // namespace fusedopt
