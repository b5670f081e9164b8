// Every update rule: what happens to ONE element, in the letters and order of its paper, and the registry of kernels
// at the end. Width, tails, formats, scaling, threads and devices belong to the loop (sweep.h).
//
// A rule is a struct with
//   Hyper      its hyperparameters, all double; `hyper` names them for Python, in that order
//   states     the names of its arrays, torch's own, in the order of operator()'s arguments
//   codes      how each of them is quantised in int8 forms: kSigned, kNonNegative, or kNotQuantised
//   Rule(h, c) computes the constants of a step, in double; c.t counts steps from 1
//   operator() the update; g is already unscaled, clipped and signed
#pragma once
#include "rules/element.h"
#include "rules/types.h"

namespace fusedopt {

namespace {

// A rule without a carried number. One with it says what the number is multiplied by in step t.
struct NoCarry {
  static constexpr bool carries = false;
  template <class Hyper>
  static FUSEDOPT_HD double factor(const Hyper&, int64_t) {
    return 1;
  }
};

// p <- p - lr (g + decay p)
template <class T>
struct Sgd : NoCarry {
  static constexpr const char* hyper = "lr weight_decay";
  static constexpr const char* states = "";
  static constexpr Format codes[] = {kNotQuantised};
  struct Hyper {
    double lr, weight_decay;
  };
  T lr, decay;
  FUSEDOPT_HD Sgd(const Hyper& h, const Clock&) : lr(T(h.lr)), decay(T(h.weight_decay)) {}
  FUSEDOPT_HD void operator()(T& p, T g) const { p = fma1(-lr, decayed(g, p, decay), p); }
};

// b <- momentum b + (1 - dampening) g, and b <- g in the first step; Nesterov looks ahead along b.
template <class T>
struct Momentum : NoCarry {
  static constexpr const char* hyper = "lr momentum dampening weight_decay nesterov";
  static constexpr const char* states = "momentum_buffer";
  static constexpr Format codes[] = {kSigned};
  struct Hyper {
    double lr, momentum, dampening, weight_decay, nesterov;
  };
  T lr, momentum, rest, decay, nesterov, first;  // of T, not bool: 16-bit loops would not be vectorised
  FUSEDOPT_HD Momentum(const Hyper& h, const Clock& c)
      : lr(T(h.lr)),
        momentum(T(h.momentum)),
        rest(T(1 - h.dampening)),
        decay(T(h.weight_decay)),
        nesterov(T(h.nesterov != 0)),
        first(T(c.t == 1)) {}
  FUSEDOPT_HD void operator()(T& p, T g, T& b) const {
    g = decayed(g, p, decay);
    b = first != T(0) ? g : fma1(rest, g, momentum * b);
    p = fma1(-lr, nesterov != T(0) ? fma1(momentum, b, g) : b, p);
  }
};

template <class T>
struct Adagrad : NoCarry {
  static constexpr const char* hyper = "lr lr_decay weight_decay eps";
  static constexpr const char* states = "sum";
  static constexpr Format codes[] = {kNonNegative};
  struct Hyper {
    double lr, lr_decay, weight_decay, eps;
  };
  T lr, decay, eps;
  FUSEDOPT_HD Adagrad(const Hyper& h, const Clock& c)
      : lr(T(h.lr / (1 + double(c.t - 1) * h.lr_decay))), decay(T(h.weight_decay)), eps(T(h.eps)) {}
  FUSEDOPT_HD void operator()(T& p, T g, T& s) const {
    g = decayed(g, p, decay);
    s = fma1(g, g, s);
    p = p - (lr * g) / (root(s) + eps);
  }
};

template <class T>
struct RMSpropBase : NoCarry {
  static constexpr const char* hyper = "lr alpha eps weight_decay momentum";
  struct Hyper {
    double lr, alpha, eps, weight_decay, momentum;
  };
  T lr, alpha, rest, eps, decay, momentum;
  FUSEDOPT_HD RMSpropBase(const Hyper& h, const Clock&)
      : lr(T(h.lr)),
        alpha(T(h.alpha)),
        rest(T(1 - h.alpha)),
        eps(T(h.eps)),
        decay(T(h.weight_decay)),
        momentum(T(h.momentum)) {}
  FUSEDOPT_HD void average(T g, T& v) const { v = fma1(rest * g, g, alpha * v); }
  FUSEDOPT_HD T deviation(T v, T g, T& a) const {  // centered: the second moment less the square of the first
    a = lerp(a, g, rest);
    return root(fma1(-a, a, v)) + eps;
  }
  FUSEDOPT_HD void move(T& p, T g, T d) const { p = p - (lr * g) / d; }
  FUSEDOPT_HD void move(T& p, T g, T d, T& b) const {
    b = momentum * b + g / d;
    p = fma1(-lr, b, p);
  }
};

template <class T>
struct RMSprop : RMSpropBase<T> {
  static constexpr const char* states = "square_avg";
  static constexpr Format codes[] = {kNonNegative};
  using RMSpropBase<T>::RMSpropBase;
  FUSEDOPT_HD void operator()(T& p, T g, T& v) const {
    g = decayed(g, p, this->decay);
    this->average(g, v);
    this->move(p, g, root(v) + this->eps);
  }
};

template <class T>
struct RMSpropMomentum : RMSpropBase<T> {
  static constexpr const char* states = "square_avg momentum_buffer";
  static constexpr Format codes[] = {kNonNegative, kSigned};
  using RMSpropBase<T>::RMSpropBase;
  FUSEDOPT_HD void operator()(T& p, T g, T& v, T& b) const {
    g = decayed(g, p, this->decay);
    this->average(g, v);
    this->move(p, g, root(v) + this->eps, b);
  }
};

template <class T>
struct RMSpropCentered : RMSpropBase<T> {
  static constexpr const char* states = "square_avg grad_avg";
  static constexpr Format codes[] = {kNonNegative, kNotQuantised};
  using RMSpropBase<T>::RMSpropBase;
  FUSEDOPT_HD void operator()(T& p, T g, T& v, T& a) const {
    g = decayed(g, p, this->decay);
    this->average(g, v);
    this->move(p, g, this->deviation(v, g, a));
  }
};

template <class T>
struct RMSpropCenteredMomentum : RMSpropBase<T> {
  static constexpr const char* states = "square_avg momentum_buffer grad_avg";
  static constexpr Format codes[] = {kNonNegative, kSigned, kNotQuantised};
  using RMSpropBase<T>::RMSpropBase;
  FUSEDOPT_HD void operator()(T& p, T g, T& v, T& b, T& a) const {
    g = decayed(g, p, this->decay);
    this->average(g, v);
    this->move(p, g, this->deviation(v, g, a), b);
  }
};

// The two moments and the two kinds of weight decay, shared by the Adam family.
template <class T>
struct Moments : NoCarry {
  T rest1, beta2, rest2, eps, decay, keep;
  template <class Hyper>
  FUSEDOPT_HD explicit Moments(const Hyper& h)
      : rest1(T(1 - h.beta1)),
        beta2(T(h.beta2)),
        rest2(T(1 - h.beta2)),
        eps(T(h.eps)),
        decay(T(h.decoupled != 0 ? 0 : h.weight_decay)),
        keep(T(h.decoupled != 0 ? 1 - h.lr * h.weight_decay : 1)) {}
  FUSEDOPT_HD void average(T& p, T& g, T& m, T& v) const {
    p = p * keep;
    g = decayed(g, p, decay);
    m = lerp(m, g, rest1);
    v = fma1(rest2 * g, g, beta2 * v);
  }
};

// AdamW is Adam with `decoupled`. The correction of v is a factor on its root: one division an element, not two.
template <class T>
struct Adam : Moments<T> {
  static constexpr const char* hyper = "lr beta1 beta2 eps weight_decay decoupled_weight_decay";
  static constexpr const char* states = "exp_avg exp_avg_sq";
  static constexpr Format codes[] = {kSigned, kNonNegative};
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, decoupled;
  };
  T lr, unbias;
  FUSEDOPT_HD Adam(const Hyper& h, const Clock& c)
      : Moments<T>(h), lr(T(h.lr / (1 - power(h.beta1, c.t)))), unbias(T(1 / sqrt(1 - power(h.beta2, c.t)))) {}
  FUSEDOPT_HD void move(T& p, T m, T v) const { p = p - (lr * m) / (fma1(root(v), unbias, this->eps)); }
  FUSEDOPT_HD void operator()(T& p, T g, T& m, T& v) const {
    this->average(p, g, m, v);
    move(p, m, v);
  }
};

template <class T>
struct AMSGrad : Adam<T> {
  static constexpr const char* states = "exp_avg exp_avg_sq max_exp_avg_sq";
  static constexpr Format codes[] = {kSigned, kNonNegative, kNotQuantised};
  using Adam<T>::Adam;
  FUSEDOPT_HD void operator()(T& p, T g, T& m, T& v, T& vmax) const {
    this->average(p, g, m, v);
    vmax = maximum(vmax, v);
    this->move(p, m, vmax);
  }
};

// Adam along a scheduled Nesterov momentum; the clock carries the product of the momenta so far.
template <class T>
struct NAdam : Moments<T> {
  static constexpr const char* hyper = "lr beta1 beta2 eps weight_decay decoupled_weight_decay momentum_decay";
  static constexpr const char* states = "exp_avg exp_avg_sq";
  static constexpr Format codes[] = {kSigned, kNonNegative};
  static constexpr bool carries = true;
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, decoupled, momentum_decay;
  };
  static FUSEDOPT_HD double mu(const Hyper& h, int64_t t) {
    constexpr double kLog096 = -0.040821994520255166;  // log(0.96)
    return h.beta1 * (1 - 0.5 * exponential(kLog096 * double(t) * h.momentum_decay));
  }
  static FUSEDOPT_HD double factor(const Hyper& h, int64_t t) { return mu(h, t); }
  T lr_g, lr_m, unbias;
  FUSEDOPT_HD NAdam(const Hyper& h, const Clock& c)
      : Moments<T>(h),
        lr_g(T(h.lr * (1 - mu(h, c.t)) / (1 - c.carry))),
        lr_m(T(h.lr * mu(h, c.t + 1) / (1 - c.carry * mu(h, c.t + 1)))),
        unbias(T(1 / sqrt(1 - power(h.beta2, c.t)))) {}
  FUSEDOPT_HD void operator()(T& p, T g, T& m, T& v) const {
    this->average(p, g, m, v);
    p = p - (lr_g * g + lr_m * m) / (fma1(root(v), unbias, this->eps));
  }
};

// Adam that waits: without the second moment's root while its variance cannot be bounded.
template <class T>
struct RAdam : Moments<T> {
  static constexpr const char* hyper = "lr beta1 beta2 eps weight_decay decoupled_weight_decay";
  static constexpr const char* states = "exp_avg exp_avg_sq";
  static constexpr Format codes[] = {kSigned, kNonNegative};
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, decoupled;
  };
  T lr, rectified;
  FUSEDOPT_HD RAdam(const Hyper& h, const Clock& c) : Moments<T>(h) {
    const double b2 = power(h.beta2, c.t), longest = 2 / (1 - h.beta2) - 1;
    const double length = longest - 2 * double(c.t) * b2 / (1 - b2);  // of the moving average, in steps
    rectified = T(length > 5);
    const double r = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length);
    lr = T(h.lr / (1 - power(h.beta1, c.t)) * (rectified != T(0) ? sqrt(r * (1 - b2)) : 1));
  }
  FUSEDOPT_HD void operator()(T& p, T g, T& m, T& v) const {
    this->average(p, g, m, v);
    p = p - (rectified != T(0) ? (lr * m) / (root(v) + this->eps) : lr * m);
  }
};

// Adam with the maximum in place of the root mean square.
template <class T>
struct Adamax : NoCarry {
  static constexpr const char* hyper = "lr beta1 beta2 eps weight_decay";
  static constexpr const char* states = "exp_avg exp_inf";
  static constexpr Format codes[] = {kSigned, kNotQuantised};
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay;
  };
  T lr, rest1, beta2, eps, decay;
  FUSEDOPT_HD Adamax(const Hyper& h, const Clock& c)
      : lr(T(h.lr / (1 - power(h.beta1, c.t)))),
        rest1(T(1 - h.beta1)),
        beta2(T(h.beta2)),
        eps(T(h.eps)),
        decay(T(h.weight_decay)) {}
  FUSEDOPT_HD void operator()(T& p, T g, T& m, T& u) const {
    g = decayed(g, p, decay);
    m = lerp(m, g, rest1);
    u = maximum(beta2 * u, magnitude(g) + eps);
    p = p - (lr * m) / u;
  }
};

// The root mean square of past updates over that of past gradients: a step in the parameter's own units.
template <class T>
struct Adadelta : NoCarry {
  static constexpr const char* hyper = "lr rho eps weight_decay";
  static constexpr const char* states = "square_avg acc_delta";
  static constexpr Format codes[] = {kNonNegative, kNotQuantised};
  struct Hyper {
    double lr, rho, eps, weight_decay;
  };
  T lr, rho, rest, eps, decay;
  FUSEDOPT_HD Adadelta(const Hyper& h, const Clock&)
      : lr(T(h.lr)), rho(T(h.rho)), rest(T(1 - h.rho)), eps(T(h.eps)), decay(T(h.weight_decay)) {}
  FUSEDOPT_HD void operator()(T& p, T g, T& v, T& a) const {
    g = decayed(g, p, decay);
    v = fma1(rest * g, g, rho * v);
    const T d = root(a + eps) / root(v + eps) * g;
    a = fma1(rest * d, d, rho * a);
    p = fma1(-lr, d, p);
  }
};

// The sign of an interpolation between momentum and gradient.
template <class T>
struct Lion : NoCarry {
  static constexpr const char* hyper = "lr beta1 beta2 weight_decay";
  static constexpr const char* states = "exp_avg";
  static constexpr Format codes[] = {kSigned};
  struct Hyper {
    double lr, beta1, beta2, weight_decay;
  };
  T lr, rest1, rest2, keep;
  FUSEDOPT_HD Lion(const Hyper& h, const Clock&)
      : lr(T(h.lr)), rest1(T(1 - h.beta1)), rest2(T(1 - h.beta2)), keep(T(1 - h.lr * h.weight_decay)) {}
  FUSEDOPT_HD void operator()(T& p, T g, T& m) const {
    p = fma1(-lr, sign(lerp(m, g, rest1)), p * keep);
    m = lerp(m, g, rest2);
  }
};

}  // namespace

// The registry: kernel name, struct. Everything else (bindings, dispatch, front ends, tests) reads it from here.
#define FUSEDOPT_RULES(X)                               \
  X(sgd, Sgd)                                           \
  X(momentum, Momentum)                                 \
  X(adagrad, Adagrad)                                   \
  X(rmsprop, RMSprop)                                   \
  X(rmsprop_momentum, RMSpropMomentum)                  \
  X(rmsprop_centered, RMSpropCentered)                  \
  X(rmsprop_centered_momentum, RMSpropCenteredMomentum) \
  X(adam, Adam)                                         \
  X(amsgrad, AMSGrad)                                   \
  X(nadam, NAdam)                                       \
  X(radam, RAdam)                                       \
  X(adamax, Adamax)                                     \
  X(adadelta, Adadelta)                                 \
  X(lion, Lion)

}  // namespace fusedopt
