// The host's kernel libraries: the module's own, one per instruction set, and those added at run time. A kernel is
// identified by its rule and its form, and resolved for the instruction set in use: the best that the processor has,
// unless FUSEDOPT_ISA or use_isa() selects another.
#pragma once
#include "library.h"

namespace fusedopt {

// Rules are numbered: the built-in ones first, then those of each added library.
struct KernelId {
  int rule, form;
  bool wide_grad = false;  // the gradient is float32, the form's is that of its 16-bit weight; on the host only
  bool operator==(const KernelId& o) const { return rule == o.rule && form == o.form && wide_grad == o.wide_grad; }
};

// The module's own library, for the instruction set in use.
const KernelLibrary& library();
// The same, for a given one.
const KernelLibrary& own_library(int isa);
// The library that a rule is in, and its number there.
const KernelLibrary& library_of(int rule, int* number);

int n_rules();
const Rule& rule_of(int rule);
const Form& form_of(KernelId id);
Format grad_format(KernelId id);
// With a wide gradient: the rule's kernel for float32 throughout, which runs between the form's decoder and encoder.
const HostKernel& host_kernel(KernelId id);
const HostForm& host_form(KernelId id);
bool exists(KernelId id);
// The kernel of a rule for operands in this form; its form is -1 if there is none. A rule without states ignores the
// form's state format. A 16-bit weight may have a float32 gradient in every form.
KernelId find_kernel(int rule, const Form& form);

// Adds a library: the same rules and forms for each instruction set, from baseline up; nullptr stands for the one
// below. Returns the number of its first rule, or -1 with the reason. The library must live as long as the process.
int add_library(const KernelLibrary* const* by_isa, int n, const char** why);

int isa_in_use();                // 0 baseline, 1 AVX2, 2 AVX-512
const char* usable_isa(int i);   // the ones that this processor can run, slowest first; nullptr after the last
bool use_isa(const char* name);  // nullptr: the best. False if it was not built or cannot run here.

}  // namespace fusedopt
