// Who runs the parts of a step. Beside torch: the OpenMP runtime that torch runs, never a second one, whose workers
// would fight torch's for the cores. For NumPy: a small pool of our own, which waits for no core that a BLAS library's
// threads still hold.
#pragma once
#include <stdint.h>

namespace fusedopt {

// How many threads a step uses when nobody says otherwise: FUSEDOPT_NUM_THREADS, else OMP_NUM_THREADS, else the
// processors this process may run on.
int default_threads();

constexpr int kMaxParts = 256;

enum class Team { kOurs, kTorch };

// Calls fn(arg, part) for every part in [0, parts), parts <= kMaxParts, on up to `threads` threads; returns when all
// are done. Results must not depend on which thread runs which part. Callable from several threads at once, and in a
// forked child.
void parallel(Team team, int threads, int parts, void (*fn)(void* arg, int part), void* arg);

// "openmp" or "pool": what Team::kTorch stands for now.
const char* torch_team();

}  // namespace fusedopt
