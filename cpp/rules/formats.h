// Storage formats: how an element is stored, and how it is converted to the number that rules compute with. Conversions
// that some instruction set lacks use integer arithmetic on all of them, so that all round alike.
//
// A format has
//   Stored     the type in memory; Word: its type in a register (16-bit values lie in the low half of 32 bits, so that
//              a loop has one vector width); Number: the type that rules compute with
//   load       Word -> Number, exact
//   store      Number -> Word; a `noisy` format rounds stochastically, by the 16 random bits it is given, the others
//              round to nearest
// After the formats of single values come those of a weight (`Plain`, and the ones with a residual) and of a
// block-quantised state (`Int8`). The combinations that exist are at the end.
#pragma once
#include "rules/element.h"
#include "rules/types.h"

namespace fusedopt {

namespace {

struct F64 {
  using Stored = double;
  using Word = double;
  using Number = double;
  using Wide = F64;
  static constexpr Format format = kF64;
  static constexpr bool noisy = false;
  static FUSEDOPT_HD double load(double x) { return x; }
  static FUSEDOPT_HD double store(double x, uint32_t = 0) { return x; }
};

struct F32 {
  using Stored = float;
  using Word = float;
  using Number = float;
  using Wide = F32;
  static constexpr Format format = kF32;
  static constexpr bool noisy = false;
  static FUSEDOPT_HD float load(float x) { return x; }
  static FUSEDOPT_HD float store(float x, uint32_t = 0) { return x; }
};

// The bits of x, with one NaN for all: rounding adds to the bits, which could carry a NaN's payload into the sign.
FUSEDOPT_HD uint32_t bits_one_nan(float x) { return bits<uint32_t>(x == x ? x : bits<float>(0x7fc00000u)); }

// Conversions in one instruction, on devices that have it: the same bits, except that a NaN may have another payload.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define FUSEDOPT_CONVERTS
FUSEDOPT_HD uint32_t to_bf16(float x) {
  uint16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
FUSEDOPT_HD uint32_t to_f16(float x) {
  uint16_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
FUSEDOPT_HD float from_f16(uint32_t x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(uint16_t(x)));
  return r;
}
#endif

struct BF16 {
  using Stored = uint16_t;
  using Word = uint32_t;
  using Number = float;
  using Wide = F32;
  static constexpr Format format = kBF16;
  static constexpr bool noisy = false;
  static FUSEDOPT_HD float load(uint32_t x) { return bits<float>(x << 16); }
  static FUSEDOPT_HD uint32_t store(float x, uint32_t = 0) {
#ifdef FUSEDOPT_CONVERTS
    return x == x ? to_bf16(x) : 0x7fc0u;
#else
    const uint32_t b = bits_one_nan(x);
    return (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
#endif
  }
  // Rounds up with the probability that the truncated digits state. Infinity stays: its digits are 0.
  static FUSEDOPT_HD uint32_t store_noisy(float x, uint32_t random) { return (bits_one_nan(x) + random) >> 16; }
};

struct F16 {
  using Stored = uint16_t;
  using Word = uint32_t;
  using Number = float;
  using Wide = F32;
  static constexpr Format format = kF16;
  static constexpr bool noisy = false;
  static FUSEDOPT_HD float load(uint32_t x) {
#ifdef FUSEDOPT_CONVERTS
    return from_f16(x);
#else
    uint32_t sign = (x & 0x8000u) << 16, size = (x & 0x7fffu) << 13;
    uint32_t normal = size + (112u << 23);  // exponent bias 15 -> 127
    uint32_t infinite = size + (224u << 23);
    // Denormal: put the digits under the exponent of 2^-14, then subtract 2^-14.
    uint32_t denormal = bits<uint32_t>(bits<float>(size + (113u << 23)) - bits<float>(113u << 23));
    uint32_t b = size >= (31u << 23) ? infinite : size < (1u << 23) ? denormal : normal;
    return bits<float>(sign | b);
#endif
  }
  static FUSEDOPT_HD uint32_t store(float x, uint32_t = 0) {
#ifdef FUSEDOPT_CONVERTS
    return to_f16(x);
#else
    uint32_t size = bits<uint32_t>(x) & 0x7fffffffu;
    uint32_t normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
    // Too small for a normal f16: adding 1/2 lets the adder round at f16's last denormal digit, 2^-24.
    uint32_t denormal = bits<uint32_t>(bits<float>(size) + 0.5f) - 0x3f000000u;
    return finish(x, size, normal, denormal);
#endif
  }
  static FUSEDOPT_HD uint32_t store_noisy(float x, uint32_t random) {
    uint32_t size = bits<uint32_t>(x) & 0x7fffffffu;
    uint32_t normal = (size - (112u << 23) + (random >> 3)) >> 13;
    // In units of 2^-24, the last digit of a denormal: add a random fraction of a unit, then truncate.
    float units = bits<float>(size < (113u << 23) ? size : 0u) * 16777216.0f;
    uint32_t denormal = uint32_t(int32_t(units + float(int32_t(random)) * 0x1p-16f));
    return finish(x, size, normal, denormal);
  }

 private:
  static FUSEDOPT_HD uint32_t finish(float x, uint32_t size, uint32_t normal, uint32_t denormal) {
    uint32_t r = size < (113u << 23) ? denormal : normal;
    r = size >= (143u << 23) ? 0x7c00u : r;                          // 65536 and above
    r = size > 0x7f800000u ? 0x7e00u | ((size >> 13) & 0x3ffu) : r;  // NaN
    return ((bits<uint32_t>(x) >> 16) & 0x8000u) | r;
  }
};

// Stochastic rounding: the result is one of the two neighbours, and its expected value is x.
template <class F>
struct Noisy : F {
  static constexpr bool noisy = true;
  static FUSEDOPT_HD uint32_t store(float x, uint32_t random) { return F::store_noisy(x, random); }
};

// --- weights: Residual is the type of a 16-bit weight's residual; load and store take both ---

struct Nothing {};

template <class F>
struct Plain {
  using Weight = F;
  using Residual = Nothing;
  using ResidualWord = Nothing;
  static constexpr Master master = kNoMaster;
  static FUSEDOPT_HD typename F::Number load(typename F::Word w, Nothing) { return F::load(w); }
  static FUSEDOPT_HD void store(typename F::Number x, typename F::Word& w, Nothing&, uint32_t random) {
    w = F::store(x, random);
  }
};

// A bf16 weight with the 16 low-order bits of a float32 as a signed residual: together exactly that float32. The weight
// is the float32 rounded half away from zero; ties to even would map 65,537 float32 values to one weight.
struct Split16 {
  using Weight = BF16;
  using Residual = int16_t;
  using ResidualWord = uint32_t;
  static constexpr Master master = kSplit16;
  // If the caller has set the weight to 0 or infinity, the sum may be NaN: the residual is then ignored.
  static FUSEDOPT_HD float join(uint32_t w, uint32_t residual) {
    const float x = bits<float>((w << 16) + residual);
    return x == x ? x : bits<float>(w << 16);
  }
  static FUSEDOPT_HD float load(uint32_t w, uint32_t residual) {
    return join(w, uint32_t(int32_t(residual << 16) >> 16));
  }
  static FUSEDOPT_HD void store(float x, uint32_t& w, uint32_t& residual, uint32_t) {
    const uint32_t b = bits_one_nan(x);
    w = (b + 0x8000u) >> 16;
    residual = b & 0xffffu;
  }
};

// The same with an 8-bit residual: a float32 without its 8 low-order bits, rounded half away from zero.
struct Split8 {
  using Weight = BF16;
  using Residual = int8_t;
  using ResidualWord = int32_t;
  static constexpr Master master = kSplit8;
  static FUSEDOPT_HD float load(uint32_t w, int32_t residual) { return Split16::join(w, uint32_t(residual) << 8); }
  static FUSEDOPT_HD void store(float x, uint32_t& w, int32_t& residual, uint32_t) {
    const uint32_t b = bits_one_nan(x) + 0x80u;
    w = (b + 0x8000u) >> 16;
    residual = int32_t(b >> 8);  // its low 8 bits
  }
};

// The residual is a float32 master, rounded to the weight. Where the weight is no longer the rounded master, because
// the caller has written it, the weight counts.
template <class F>
struct Copied {
  using Weight = F;
  using Residual = float;
  using ResidualWord = float;
  static constexpr Master master = kFloat32;
  static FUSEDOPT_HD float load(uint32_t w, float residual) { return F::store(residual) == w ? residual : F::load(w); }
  static FUSEDOPT_HD void store(float x, uint32_t& w, float& residual, uint32_t) {
    w = F::store(x);
    residual = x;
  }
};

// --- block-quantised states: 8 bits per element, and one float32 scale s per block, its largest magnitude. A code is
// the square root of an element's ratio to s, rounded stochastically: codes are dense near zero, where most elements
// lie. ---

// Adding it rounds a small number to an integer, which is then the low-order byte of the sum's bits.
constexpr float kWhole = 0x1.8p23f;
// The random shift of a code before it is rounded to nearest, from random bits, the most significant first. It is less
// than half a quantisation step, so exactly representable values round-trip, and no code exceeds top.
FUSEDOPT_HD float code_shift(uint32_t random) { return float(int32_t(random)) * 0x1.ffep-33f; }

// x = s c |c| / 127^2 for a moment with a sign, c in [-127, 127].
struct SignedRoot {
  static constexpr Format format = kI8;
  static constexpr float top = 127.0f;
  static FUSEDOPT_HD float decode(uint8_t code) {
    const int c = int8_t(code);
    return float(int16_t(c * (c < 0 ? -c : c)));
  }
  static FUSEDOPT_HD float size(float x) { return magnitude(x); }
  static FUSEDOPT_HD float inverse(float s) { return top * top / s; }
  static FUSEDOPT_HD float shifted(float x, float inverse, float shift) { return root(x * inverse) + shift; }
  // c: shifted, not rounded; the sign is that of x.
  static FUSEDOPT_HD uint32_t encode(float c, float x, uint32_t) { return bits<uint32_t>(signed_as(c, x) + kWhole); }
};

// x = s c^2 / 255^2 for a second moment, c in [1, 255], or 0 in a block of zeros: a divisor must not become 0.
struct Root {
  static constexpr Format format = kU8;
  static constexpr float top = 255.0f;
  static FUSEDOPT_HD float decode(uint8_t code) {
    const int c = code;
    return float(uint16_t(c * c));
  }
  static FUSEDOPT_HD float size(float x) { return x; }
  // The rule has computed this root, and the compiler may reuse it.
  static FUSEDOPT_HD float inverse(float s) { return top / root(s); }
  static FUSEDOPT_HD float shifted(float x, float inverse, float shift) { return fma1(root(x), inverse, shift); }
  static FUSEDOPT_HD uint32_t encode(float c, float, uint32_t least) {
    const uint32_t code = bits<uint32_t>(c + kWhole);
    return code > least ? code : least;
  }
};

struct Int8 {
  using Stored = uint8_t;
  using Word = uint32_t;
  static constexpr Format format = kI8;
  static constexpr bool noisy = true;
};

template <Format>
struct Code;
template <>
struct Code<kI8> {
  using type = SignedRoot;
};
template <>
struct Code<kU8> {
  using type = Root;
};

// A scale is normal if it is finite and at least kTiny: below, products underflow. With `Normal` the conversions assume
// it and omit the care that other scales need.
constexpr float kTiny = 0x1p-96f;
FUSEDOPT_HD bool normal_scale(float scale) {
  return bits<uint32_t>(scale) - bits<uint32_t>(kTiny) < 0x7f800000u - bits<uint32_t>(kTiny);
}

// Converts the codes of a block to numbers.
template <class C, bool Normal = false>
struct Decoder {
  float unit, tiny;
  FUSEDOPT_HD explicit Decoder(float scale)
      : unit((!Normal && scale < kTiny ? 1.0f : scale) * (1.0f / (C::top * C::top))),
        tiny(!Normal && scale < kTiny ? scale : 1.0f) {}
  FUSEDOPT_HD float operator()(uint8_t code) const { return C::decode(code) * unit * tiny; }
};

// Converts the numbers of a block, whose largest magnitude is `size`, to codes.
template <class C, bool Normal = false>
struct Encoder {
  float up, inverse;
  uint32_t least;
  FUSEDOPT_HD explicit Encoder(float size)
      : up(!Normal && size < kTiny ? 0x1p64f : 1.0f),
        inverse(!Normal && size == 0.0f ? 0.0f : C::inverse(size * up)),
        least(bits<uint32_t>(kWhole) + (Normal || size != 0.0f ? 1 : 0)) {}
  FUSEDOPT_HD uint8_t operator()(float x, float shift) const {
    const float c = C::shifted(C::size(x) * up, inverse, shift);
    return uint8_t(C::encode(Normal || c == c ? c : 0.0f, x, least));
  }
};

// The bits of a number's magnitude, which have the same order as the magnitudes; NaN is the largest.
FUSEDOPT_HD uint32_t size_bits(float x) { return bits<uint32_t>(x) & 0x7fffffffu; }

// Whether all states can be quantised.
constexpr bool quantisable(const Format* codes, int n) {
  for (int k = 0; k < n; ++k)
    if (codes[k] == kFormats) return false;
  return n > 0;
}

}  // namespace

// The combinations that exist: weight, gradient, state. Any other is refused by name.
#ifdef FUSEDOPT_FEW_FORMATS  // one of each kind, for development builds and tools
#define FUSEDOPT_FORMATS(X)                \
  X(Plain<F64>, F64, F64)                  \
  X(Plain<F32>, F32, F32)                  \
  X(Plain<Noisy<BF16>>, BF16, Noisy<BF16>) \
  X(Split8, BF16, Int8)
#else
#define FUSEDOPT_FORMATS(X)                \
  X(Plain<F64>, F64, F64)                  \
  X(Plain<F32>, F32, F32)                  \
  X(Plain<BF16>, BF16, BF16)               \
  X(Plain<F16>, F16, F16)                  \
  X(Plain<F32>, BF16, F32)                 \
  X(Plain<F32>, F16, F32)                  \
  X(Plain<BF16>, BF16, F32)                \
  X(Plain<F16>, F16, F32)                  \
  X(Plain<F32>, F32, BF16)                 \
  X(Plain<F32>, F32, F16)                  \
  X(Plain<F32>, F32, Noisy<BF16>)          \
  X(Plain<F32>, F32, Noisy<F16>)           \
  X(Plain<BF16>, BF16, Noisy<BF16>)        \
  X(Plain<F16>, F16, Noisy<F16>)           \
  X(Plain<F32>, F32, Int8)                 \
  X(Plain<F32>, BF16, Int8)                \
  X(Plain<Noisy<BF16>>, BF16, F32)         \
  X(Plain<Noisy<BF16>>, BF16, Noisy<BF16>) \
  X(Plain<Noisy<BF16>>, BF16, Int8)        \
  X(Plain<Noisy<F16>>, F16, F32)           \
  X(Plain<Noisy<F16>>, F16, Noisy<F16>)    \
  X(Split16, BF16, F32)                    \
  X(Split16, BF16, Noisy<BF16>)            \
  X(Split16, BF16, Int8)                   \
  X(Split8, BF16, F32)                     \
  X(Split8, BF16, Noisy<BF16>)             \
  X(Split8, BF16, Int8)                    \
  X(Copied<BF16>, BF16, F32)               \
  X(Copied<BF16>, BF16, Noisy<BF16>)       \
  X(Copied<BF16>, BF16, Int8)              \
  X(Copied<F16>, F16, F32)                 \
  X(Copied<F16>, F16, Int8)
#endif

}  // namespace fusedopt
