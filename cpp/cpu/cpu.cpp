// Instantiates every rule x formats, the losses and the layers for one instruction set. Compiled once for each
// (FUSEDOPT_ISA names it); exports one table and nothing else, so no symbol is shared between instruction sets.
#include "cpu/sweep.h"
#include "network/layers.h"
#include "network/losses.h"

#ifndef FUSEDOPT_ISA
#error "FUSEDOPT_ISA: baseline, avx2 or avx512"
#endif
#define FUSEDOPT_STR_(a) #a
#define FUSEDOPT_STR(a) FUSEDOPT_STR_(a)

namespace fusedopt {
namespace {

template <class Sweep>
constexpr Loop loop() {
  if constexpr (Sweep::exists) {
    return {Sweep::prepare, Sweep::sweep, Sweep::finish, Sweep::form, Sweep::counts};
  } else {
    return {nullptr, nullptr, nullptr, Sweep::form, false};
  }
}

template <template <class> class Rule>
struct Loops {
#define LOOP(W, G, S) loop<Sweep<Rule<W::Weight::Number>, W, G, S>>(),
  static constexpr Loop all[] = {FUSEDOPT_FORMATS(LOOP)};
#undef LOOP
};
template <template <class> class Rule>
constexpr Loop Loops<Rule>::all[];

template <template <class> class Rule>
constexpr Kernel kernel(const char* name) {
  using R = Rule<double>;
  return {name,
          R::hyper,
          R::states,
          R::carries,
          Sweep<R, Plain<F64>, F64, F64>::advance,
          Loops<Rule>::all,
          int(sizeof(Loops<Rule>::all) / sizeof(Loop)),
          words(R::states)};
}

#define KERNEL(name, Rule) kernel<Rule>(#name),
constexpr Kernel kernels[] = {FUSEDOPT_RULES(KERNEL)};
#undef KERNEL

constexpr NetworkTable network = {element_losses,
                                  int(sizeof(element_losses) / sizeof(ElementLoss)),
                                  FUSEDOPT_BOTH(unfit),
                                  FUSEDOPT_BOTH(softmax_loss),
                                  FUSEDOPT_BOTH(penalty),
                                  FUSEDOPT_BOTH(dropout),
                                  FUSEDOPT_ACTIVATIONS(forward),
                                  FUSEDOPT_ACTIVATIONS(backward),
                                  FUSEDOPT_BOTH(column_sums),
                                  FUSEDOPT_BOTH(column_squares),
                                  FUSEDOPT_BOTH(normalize),
                                  FUSEDOPT_BOTH(normal_sums),
                                  FUSEDOPT_BOTH(normal_back)};

constexpr Table table = {FUSEDOPT_STR(FUSEDOPT_ISA),
                         kernels,
                         int(sizeof(kernels) / sizeof(Kernel)),
                         {square_sum<F64>, square_sum<F32>, square_sum<BF16>, square_sum<F16>},
                         &network};

}  // namespace

const Table* FUSEDOPT_CAT(table_, FUSEDOPT_ISA)() { return &table; }

}  // namespace fusedopt
