// Losses and layers for one instruction set (FUSEDOPT_ISA): compiled once for each, exports one table.
#include "network/layers.h"
#include "network/losses.h"

namespace fusedopt {
namespace {

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
                                  FUSEDOPT_BOTH(normal_back),
                                  FUSEDOPT_BOTH(products),
                                  FUSEDOPT_BOTH(products_back)};

}  // namespace

const NetworkTable* FUSEDOPT_CAT(network_, FUSEDOPT_ISA)() { return &network; }

}  // namespace fusedopt
