// Which build of cpu.cpp runs. Chosen once from what the processor has; FUSEDOPT_ISA or use_isa() forces one.
#pragma once
#include "library.h"

namespace fusedopt {

const Table& table();              // the one in use
const Table* usable_table(int i);  // those this processor can run, slowest first; nullptr past the last
bool use_isa(const char* name);    // nullptr: the best again. False when there is no such build or processor.

}  // namespace fusedopt
