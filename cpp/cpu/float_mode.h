// Saves the processor's floating-point mode for the duration of a call.
#pragma once
#include <fenv.h>

#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace fusedopt {

// Sets IEEE's default mode (no flush to zero, round to nearest); the destructor restores the caller's.
class FloatMode {
 public:
#if defined(__SSE2__) || defined(_M_X64)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FloatMode() {
    fegetenv(&saved_);
    fesetenv(FE_DFL_ENV);
  }
  ~FloatMode() { fesetenv(&saved_); }

 private:
  fenv_t saved_;
#endif
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;
};

}  // namespace fusedopt
