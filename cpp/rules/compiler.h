// Macros for compiler features: functions that are always inlined, on host and devices; loops with independent
// iterations; functions that are never inlined.
#pragma once

#if defined(__CUDACC__)
#define FUSEDOPT_HD __host__ __device__ inline
#elif defined(__GNUC__)
// Forced: with many rules GCC reaches its inlining limits, and a loop with a call is not vectorised.
#define FUSEDOPT_HD inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define FUSEDOPT_HD __forceinline
#else
#define FUSEDOPT_HD inline
#endif

#if defined(__clang__)
#define FUSEDOPT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FUSEDOPT_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define FUSEDOPT_INDEPENDENT __pragma(loop(ivdep))
#else
#define FUSEDOPT_INDEPENDENT
#endif

#if defined(__GNUC__)
#define FUSEDOPT_APART __attribute__((noinline))
#else
#define FUSEDOPT_APART
#endif

#define FUSEDOPT_CAT_(a, b) a##b
#define FUSEDOPT_CAT(a, b) FUSEDOPT_CAT_(a, b)
#define FUSEDOPT_STR_(a) #a
#define FUSEDOPT_STR(a) FUSEDOPT_STR_(a)
