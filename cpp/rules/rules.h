// Every update rule: what happens to ONE element, in the letters and order of its paper, and the registry of kernels
// at the end. Width, tails, formats, scaling, threads and devices belong to the loop (sweep.h).
//
// A rule is a struct with
//   Hyper      its hyperparameters, all double; `hyper` names them for Python, in that order
//   states     the names of its arrays, torch's own, in the order of operator()'s arguments
//   codes      how each of them is quantised in int8 forms: kSigned, kNonNegative, or kNotQuantised
//   Rule(h, c) computes the constants of a step, in double; c.t counts steps from 1
//   operator() the update; g is already unscaled, clipped and signed
//
// Letters: p parameter, g gradient, m and v first and second moment, b velocity. w1 = 1 - beta1 and w2 = 1 - beta2 are
// the weights of the newest gradient in an average; keep = 1 - lr weight_decay is the factor of decoupled weight decay;
// unbias = 1 / sqrt(1 - beta2^t) corrects the root of v. `decay` is the factor of p that is added to g (L2 penalty).
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

// g <- g + decay p,  p <- p - lr g. The penalty of every rule below is this one.
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

// b <- momentum b + (1 - dampening) g, in the first step b <- g;  p <- p - lr b, with Nesterov p - lr (g + momentum b)
template <class T>
struct Momentum : NoCarry {
  static constexpr const char* hyper = "lr momentum dampening weight_decay nesterov";
  static constexpr const char* states = "momentum_buffer";
  static constexpr Format codes[] = {kSigned};
  struct Hyper {
    double lr, momentum, dampening, weight_decay, nesterov;
  };
  T lr, momentum, w, decay, nesterov, first;  // of T, not bool: 16-bit loops would not be vectorised
  FUSEDOPT_HD Momentum(const Hyper& h, const Clock& c)
      : lr(T(h.lr)),
        momentum(T(h.momentum)),
        w(T(1 - h.dampening)),
        decay(T(h.weight_decay)),
        nesterov(T(h.nesterov != 0)),
        first(T(c.t == 1)) {}
  FUSEDOPT_HD void operator()(T& p, T g, T& b) const {
    g = decayed(g, p, decay);
    b = first != T(0) ? g : fma1(w, g, momentum * b);
    p = fma1(-lr, nesterov != T(0) ? fma1(momentum, b, g) : b, p);
  }
};

// s <- s + g^2,  p <- p - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)
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

// v <- alpha v + (1 - alpha) g^2,  p <- p - lr g / (sqrt(v) + eps). Centered: v - a^2 in place of v, where
// a <- alpha a + (1 - alpha) g. With momentum: b <- momentum b + g / (sqrt(v) + eps),  p <- p - lr b.
template <class T>
struct RMSpropBase : NoCarry {
  static constexpr const char* hyper = "lr alpha eps weight_decay momentum";
  struct Hyper {
    double lr, alpha, eps, weight_decay, momentum;
  };
  T lr, alpha, w, eps, decay, momentum;
  FUSEDOPT_HD RMSpropBase(const Hyper& h, const Clock&)
      : lr(T(h.lr)),
        alpha(T(h.alpha)),
        w(T(1 - h.alpha)),
        eps(T(h.eps)),
        decay(T(h.weight_decay)),
        momentum(T(h.momentum)) {}
  FUSEDOPT_HD void average(T g, T& v) const { v = fma1(w * g, g, alpha * v); }
  FUSEDOPT_HD T deviation(T v, T g, T& a) const {
    a = lerp(a, g, w);
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

// Both kinds of weight decay and the two moments, shared by the Adam family:
// p <- keep p or g <- g + decay p,  m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2
template <class T>
struct Moments : NoCarry {
  T w1, beta2, w2, eps, decay, keep;
  template <class Hyper>
  FUSEDOPT_HD explicit Moments(const Hyper& h)
      : w1(T(1 - h.beta1)),
        beta2(T(h.beta2)),
        w2(T(1 - h.beta2)),
        eps(T(h.eps)),
        decay(T(h.decoupled != 0 ? 0 : h.weight_decay)),
        keep(T(h.decoupled != 0 ? 1 - h.lr * h.weight_decay : 1)) {}
  FUSEDOPT_HD void average(T& p, T& g, T& m, T& v) const {
    p = p * keep;
    g = decayed(g, p, decay);
    m = lerp(m, g, w1);
    v = fma1(w2 * g, g, beta2 * v);
  }
};

// p <- p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps). AdamW is this rule with `decoupled`; SparseAdam,
// with `early_eps`, adds eps to sqrt(v) before its correction. The correction of v is a factor of its root, so each
// element needs one division, not two.
template <class T>
struct Adam : Moments<T> {
  static constexpr const char* hyper = "lr beta1 beta2 eps weight_decay decoupled_weight_decay early_eps";
  static constexpr const char* states = "exp_avg exp_avg_sq";
  static constexpr Format codes[] = {kSigned, kNonNegative};
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, decoupled, early_eps;
  };
  T lr, unbias;
  FUSEDOPT_HD Adam(const Hyper& h, const Clock& c)
      : Moments<T>(h), lr(T(h.lr / (1 - power(h.beta1, c.t)))), unbias(T(1 / sqrt(1 - power(h.beta2, c.t)))) {
    if (h.early_eps != 0) this->eps = T(h.eps / sqrt(1 - power(h.beta2, c.t)));
  }
  FUSEDOPT_HD void move(T& p, T m, T v) const { p = p - (lr * m) / (fma1(root(v), unbias, this->eps)); }
  FUSEDOPT_HD void operator()(T& p, T g, T& m, T& v) const {
    this->average(p, g, m, v);
    move(p, m, v);
  }
};

// Adam with the largest v so far in place of v.
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

// p <- p - lr ((1 - mu) g / (1 - M) + mu' m / (1 - M mu')) / (sqrt(v / (1 - beta2^t)) + eps), where mu and mu' are the
// scheduled momenta of this step and the next, and M is the product of the momenta so far, which the clock carries.
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

// p <- p - lr r m / (1 - beta1^t) sqrt(1 - beta2^t) / (sqrt(v) + eps), r being the rectification; while the variance of
// the adaptive rate is unbounded, p <- p - lr m / (1 - beta1^t).
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
    const double length = longest - 2 * double(c.t) * b2 / (1 - b2);  // of the moving average, in steps: rho_t
    rectified = T(length > 5);
    const double r = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length);
    lr = T(h.lr / (1 - power(h.beta1, c.t)) * (rectified != T(0) ? sqrt(r * (1 - b2)) : 1));
  }
  FUSEDOPT_HD void operator()(T& p, T g, T& m, T& v) const {
    this->average(p, g, m, v);
    p = p - (rectified != T(0) ? (lr * m) / (root(v) + this->eps) : lr * m);
  }
};

// u <- max(beta2 u, |g| + eps),  p <- p - lr m / ((1 - beta1^t) u)
template <class T>
struct Adamax : NoCarry {
  static constexpr const char* hyper = "lr beta1 beta2 eps weight_decay";
  static constexpr const char* states = "exp_avg exp_inf";
  static constexpr Format codes[] = {kSigned, kNotQuantised};
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay;
  };
  T lr, w1, beta2, eps, decay;
  FUSEDOPT_HD Adamax(const Hyper& h, const Clock& c)
      : lr(T(h.lr / (1 - power(h.beta1, c.t)))),
        w1(T(1 - h.beta1)),
        beta2(T(h.beta2)),
        eps(T(h.eps)),
        decay(T(h.weight_decay)) {}
  FUSEDOPT_HD void operator()(T& p, T g, T& m, T& u) const {
    g = decayed(g, p, decay);
    m = lerp(m, g, w1);
    u = maximum(beta2 * u, magnitude(g) + eps);
    p = p - (lr * m) / u;
  }
};

// v <- rho v + (1 - rho) g^2,  d = sqrt(a + eps) / sqrt(v + eps) g,  a <- rho a + (1 - rho) d^2,  p <- p - lr d
template <class T>
struct Adadelta : NoCarry {
  static constexpr const char* hyper = "lr rho eps weight_decay";
  static constexpr const char* states = "square_avg acc_delta";
  static constexpr Format codes[] = {kNonNegative, kNotQuantised};
  struct Hyper {
    double lr, rho, eps, weight_decay;
  };
  T lr, rho, w, eps, decay;
  FUSEDOPT_HD Adadelta(const Hyper& h, const Clock&)
      : lr(T(h.lr)), rho(T(h.rho)), w(T(1 - h.rho)), eps(T(h.eps)), decay(T(h.weight_decay)) {}
  FUSEDOPT_HD void operator()(T& p, T g, T& v, T& a) const {
    g = decayed(g, p, decay);
    v = fma1(w * g, g, rho * v);
    const T d = root(a + eps) / root(v + eps) * g;
    a = fma1(w * d, d, rho * a);
    p = fma1(-lr, d, p);
  }
};

// p <- keep p - lr sign(beta1 m + (1 - beta1) g),  m <- beta2 m + (1 - beta2) g
template <class T>
struct Lion : NoCarry {
  static constexpr const char* hyper = "lr beta1 beta2 weight_decay";
  static constexpr const char* states = "exp_avg";
  static constexpr Format codes[] = {kSigned};
  struct Hyper {
    double lr, beta1, beta2, weight_decay;
  };
  T lr, w1, w2, keep;
  FUSEDOPT_HD Lion(const Hyper& h, const Clock&)
      : lr(T(h.lr)), w1(T(1 - h.beta1)), w2(T(1 - h.beta2)), keep(T(1 - h.lr * h.weight_decay)) {}
  FUSEDOPT_HD void operator()(T& p, T g, T& m) const {
    p = fma1(-lr, sign(lerp(m, g, w1)), p * keep);
    m = lerp(m, g, w2);
  }
};

// AdamW with a second, slower average of the gradient m2, which is not corrected:
// p <- (1 - lr decay) p - lr (m / (1 - beta1^t) + alpha m2) / (sqrt(v / (1 - beta2^t)) + eps)
template <class T>
struct AdEMAMix : NoCarry {
  static constexpr const char* hyper = "lr beta1 beta2 beta3 alpha eps weight_decay";
  static constexpr const char* states = "exp_avg exp_avg_sq exp_avg_slow";
  static constexpr Format codes[] = {kSigned, kNonNegative, kSigned};
  struct Hyper {
    double lr, beta1, beta2, beta3, alpha, eps, weight_decay;
  };
  T lr, lr_slow, w1, beta2, w2, w3, eps, keep, unbias;
  FUSEDOPT_HD AdEMAMix(const Hyper& h, const Clock& c)
      : lr(T(h.lr / (1 - power(h.beta1, c.t)))),
        lr_slow(T(h.lr * h.alpha)),
        w1(T(1 - h.beta1)),
        beta2(T(h.beta2)),
        w2(T(1 - h.beta2)),
        w3(T(1 - h.beta3)),
        eps(T(h.eps)),
        keep(T(1 - h.lr * h.weight_decay)),
        unbias(T(1 / sqrt(1 - power(h.beta2, c.t)))) {}
  FUSEDOPT_HD void operator()(T& p, T g, T& m, T& v, T& m2) const {
    m = lerp(m, g, w1);
    v = fma1(w2 * g, g, beta2 * v);
    m2 = lerp(m2, g, w3);
    p = p * keep - fma1(lr_slow, m2, lr * m) / (fma1(root(v), unbias, eps));
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
  X(lion, Lion)                                         \
  X(ademamix, AdEMAMix)

}  // namespace fusedopt
