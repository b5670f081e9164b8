// The kernel library of one instruction set: every rule in every form. Compiled once per instruction set
// (FUSEDOPT_ISA), in FUSEDOPT_PARTS parts with some of the rules each. Part 0 exports the library and each part its
// kernels, under names that contain the instruction set; nothing else has external linkage.
#include "cpu/sweep.h"

#ifndef FUSEDOPT_PARTS
#define FUSEDOPT_PARTS 1
#define FUSEDOPT_PART 0
#endif
#define FUSEDOPT_KERNELS(part) FUSEDOPT_CAT(FUSEDOPT_CAT(FUSEDOPT_CAT(kernels_, FUSEDOPT_ISA), _), part)

namespace fusedopt {
namespace {

template <class U>
void prepare(const void*, const double* hyper, const Clock& clock, double scale, void* prepared) {
  U::prepare(hyper, clock, scale, prepared);
}

template <class K>
constexpr HostKernel host_kernel() {
  if constexpr (K::exists) {
    return {nullptr, prepare<typename K::Alone>, K::sweep, nullptr};
  } else {
    return {nullptr, nullptr, nullptr, nullptr};
  }
}

template <template <class> class R>
struct KernelsOf {
#define KERNEL(W, G, S) host_kernel<Sweep<R<W::Weight::Number>, W, G, S>>(),
  static constexpr HostKernel all[] = {FUSEDOPT_FORMATS(KERNEL)};
#undef KERNEL
};

template <template <class> class R, int number>
const HostKernel* in_this_part() {
  if constexpr (number % FUSEDOPT_PARTS == FUSEDOPT_PART) {
    return KernelsOf<R>::all;
  } else {
    return nullptr;
  }
}

}  // namespace

// The kernels of one rule, by form; nullptr if they are in another part.
const HostKernel* FUSEDOPT_KERNELS(FUSEDOPT_PART)(int rule) {
#define RULE(name, R) \
  if (rule == name##_number) return in_this_part<R, name##_number>();
  FUSEDOPT_RULES(RULE)
#undef RULE
  return nullptr;
}

#if FUSEDOPT_PART == 0
#if FUSEDOPT_PARTS > 1
const HostKernel* FUSEDOPT_KERNELS(1)(int rule);
#endif
static_assert(FUSEDOPT_PARTS <= 2, "name the other parts");
namespace {

const HostKernel* kernels[kRules];
HostTable host = {kernels, nullptr, {square_sum<F64>, square_sum<F32>, square_sum<BF16>, square_sum<F16>}};
constexpr KernelLibrary library = {
    FUSEDOPT_VERSION, kHostSize, FUSEDOPT_STR(FUSEDOPT_ISA), rules, kRules, forms, kForms, &host, nullptr};

}  // namespace

// Not thread-safe.
const KernelLibrary* FUSEDOPT_CAT(library_, FUSEDOPT_ISA)() {
  for (int r = 0; r < kRules; ++r) {
    kernels[r] = FUSEDOPT_KERNELS(FUSEDOPT_PART)(r);
#if FUSEDOPT_PARTS > 1
    if (!kernels[r]) kernels[r] = FUSEDOPT_KERNELS(1)(r);
#endif
  }
  host.forms = FUSEDOPT_CAT(forms_, FUSEDOPT_ISA)();
  return &library;
}
#endif

}  // namespace fusedopt
