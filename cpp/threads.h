// Who runs the parts of a step: the OpenMP runtime that the process already has (torch's), else a small pool of our
// own, else the caller alone. Never a second OpenMP runtime: its workers would fight torch's for the cores.
#pragma once
#include <stdint.h>

namespace fusedopt {

// How many threads a step uses when nobody says otherwise: FUSEDOPT_NUM_THREADS, else OMP_NUM_THREADS, else the
// processors this process may run on.
int default_threads();

constexpr int kMaxParts = 256;

// Calls fn(arg, part) for every part in [0, parts), parts <= kMaxParts, on up to `parts` threads; returns when all are done. Results must
// not depend on which thread runs which part. Callable from several threads at once, and in a forked child.
void parallel(int parts, void (*fn)(void* arg, int part), void* arg);

// "openmp" or "pool": what parallel() would use now.
const char* parallel_runtime();

}  // namespace fusedopt
