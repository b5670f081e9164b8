// The threads of a step. Beside torch: the OpenMP runtime that torch has loaded, since the workers of a second one
// would compete with torch's for the cores. For NumPy: a small thread pool that does not wait for workers without a
// core, which the threads of a BLAS library may still occupy.
#pragma once
#include <stdint.h>

#include <type_traits>

#include "cpu/float_mode.h"

namespace fusedopt {

// The default number of threads of a step: FUSEDOPT_NUM_THREADS, else OMP_NUM_THREADS, else the processors in the
// affinity mask of this process.
int default_threads();

constexpr int kMaxParts = 256;

enum class Team { kOurs, kTorch };

// Calls fn(arg, part) for every part in [0, parts), parts <= kMaxParts, on up to `threads` threads, and returns when
// all are done. Any thread may run any part. Thread-safe, and usable in a forked child.
void parallel(Team team, int threads, int parts, void (*fn)(void* arg, int part), void* arg);

// The same for body(part), in the floating-point mode of the kernels.
template <class F>
void parallel(Team team, int threads, int parts, F&& body) {
  auto call = [](void* f, int part) {
    FloatMode mode;
    (*static_cast<std::remove_reference_t<F>*>(f))(part);
  };
  parallel(team, threads, parts, call, &body);
}

// "openmp" or "pool": what Team::kTorch currently uses.
const char* torch_team();

}  // namespace fusedopt
