// How one element is stored, and how it becomes a number to compute with. Integer arithmetic only where the hardware
// of some instruction set has no conversion, so that all of them round alike (to nearest, ties to even).
#pragma once
#include <stdint.h>
#include <string.h>

#include "element.h"

namespace fusedopt {

enum Format : int { kF64, kF32, kBF16, kF16, kFormats };

namespace {

template <class To, class From>
FUSEDOPT_HD To bits(From x) {
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

struct F64 {
  using Stored = double;
  using Number = double;
  static constexpr Format format = kF64;
  static FUSEDOPT_HD double load(double x) { return x; }
  static FUSEDOPT_HD double store(double x) { return x; }
};

struct F32 {
  using Stored = float;
  using Number = float;
  static constexpr Format format = kF32;
  static FUSEDOPT_HD float load(float x) { return x; }
  static FUSEDOPT_HD float store(float x) { return x; }
};

struct BF16 {
  using Stored = uint16_t;
  using Number = float;
  static constexpr Format format = kBF16;
  static FUSEDOPT_HD float load(uint16_t x) { return bits<float>(uint32_t(x) << 16); }
  static FUSEDOPT_HD uint16_t store(float x) {
    uint32_t b = bits<uint32_t>(x);
    uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return uint16_t(x != x ? (b >> 16) | 0x40u : rounded);
  }
};

struct F16 {
  using Stored = uint16_t;
  using Number = float;
  static constexpr Format format = kF16;
  static FUSEDOPT_HD float load(uint16_t x) {
    uint32_t sign = uint32_t(x & 0x8000u) << 16, rest = uint32_t(x & 0x7fffu) << 13;
    uint32_t normal = rest + (112u << 23);  // exponent bias 15 -> 127
    uint32_t infinite = rest + (224u << 23);
    // A denormal: put the digits under the exponent of 2^-14 and take that 2^-14 off again.
    uint32_t denormal = bits<uint32_t>(bits<float>(rest + (113u << 23)) - bits<float>(113u << 23));
    uint32_t b = rest >= (31u << 23) ? infinite : rest < (1u << 23) ? denormal : normal;
    return bits<float>(sign | b);
  }
  static FUSEDOPT_HD uint16_t store(float x) {
    uint32_t b = bits<uint32_t>(x), sign = (b >> 16) & 0x8000u, rest = b & 0x7fffffffu;
    uint32_t normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    // Too small for a normal f16: adding 1/2 lets the adder round at f16's last denormal digit, 2^-24.
    uint32_t denormal = bits<uint32_t>(bits<float>(rest) + 0.5f) - 0x3f000000u;
    uint32_t r = rest < (113u << 23) ? denormal : normal;
    r = rest >= (143u << 23) ? 0x7c00u : r;                          // 65536 and above
    r = rest > 0x7f800000u ? 0x7e00u | ((rest >> 13) & 0x3ffu) : r;  // NaN
    return uint16_t(sign | r);
  }
};

}  // namespace

// The combinations that exist: parameter, gradient, state. The rest is refused by name.
#define FUSEDOPT_FORMATS(X) \
  X(F64, F64, F64)          \
  X(F32, F32, F32)          \
  X(BF16, BF16, BF16)       \
  X(F16, F16, F16)          \
  X(F32, BF16, F32)         \
  X(F32, F16, F32)          \
  X(BF16, BF16, F32)        \
  X(F16, F16, F32)          \
  X(F32, F32, BF16)         \
  X(F32, F32, F16)

}  // namespace fusedopt
