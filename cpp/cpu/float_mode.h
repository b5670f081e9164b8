// The processor's floating-point mode, set aside for the time of a call.
#pragma once
#include <fenv.h>

#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace fusedopt {

// Arithmetic is IEEE's default, whatever the caller's mode (flush to zero, rounding), which comes back.
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
