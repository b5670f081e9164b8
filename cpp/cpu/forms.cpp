// The forms of one instruction set apart from any rule: decoding, encoding and what follows an update. Compiled once
// for each instruction set, which FUSEDOPT_ISA names.
#include "cpu/codec.h"
#include "cpu/sweep.h"

namespace fusedopt {
namespace {

#define FORM(W, G, S) \
  {finish<Storage<W, W::Weight, W::Weight>>, Codec<Storage<W, G, S>>::decode, Codec<Storage<W, G, S>>::encode},
constexpr HostForm host_forms[] = {FUSEDOPT_FORMATS(FORM)};
#undef FORM

}  // namespace

const HostForm* FUSEDOPT_CAT(forms_, FUSEDOPT_ISA)() { return host_forms; }

}  // namespace fusedopt
