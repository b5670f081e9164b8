// How an element is stored, and how it becomes a number to compute with. Integer arithmetic only where the hardware of
// some instruction set has no conversion, so that all of them round alike.
//
// A format has
//   Stored     what lies in memory; Word: the same in a register (16 bits lie in the low half of 32, so that a loop
//              over them keeps one vector width); Number: what rules compute with
//   load       Word -> Number, exact
//   store      Number -> Word; a format that is `noisy` rounds by the 16 random bits it is given, the others to nearest
// Below the formats stand those of a weight (`Plain`, and the ones that keep what rounding takes away) and the
// block-quantised state (`Int8`); at the end the combinations that exist.
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

// The bits of x, with one NaN for all: what is added below to round could carry another's payload into the sign.
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
  // Up with the probability of what is cut off. Infinity stays: its digits are 0.
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
    uint32_t sign = (x & 0x8000u) << 16, rest = (x & 0x7fffu) << 13;
    uint32_t normal = rest + (112u << 23);  // exponent bias 15 -> 127
    uint32_t infinite = rest + (224u << 23);
    // A denormal: put the digits under the exponent of 2^-14 and take that 2^-14 off again.
    uint32_t denormal = bits<uint32_t>(bits<float>(rest + (113u << 23)) - bits<float>(113u << 23));
    uint32_t b = rest >= (31u << 23) ? infinite : rest < (1u << 23) ? denormal : normal;
    return bits<float>(sign | b);
#endif
  }
  static FUSEDOPT_HD uint32_t store(float x, uint32_t = 0) {
#ifdef FUSEDOPT_CONVERTS
    return to_f16(x);
#else
    uint32_t rest = bits<uint32_t>(x) & 0x7fffffffu;
    uint32_t normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    // Too small for a normal f16: adding 1/2 lets the adder round at f16's last denormal digit, 2^-24.
    uint32_t denormal = bits<uint32_t>(bits<float>(rest) + 0.5f) - 0x3f000000u;
    return finish(x, rest, normal, denormal);
#endif
  }
  static FUSEDOPT_HD uint32_t store_noisy(float x, uint32_t random) {
    uint32_t rest = bits<uint32_t>(x) & 0x7fffffffu;
    uint32_t normal = (rest - (112u << 23) + (random >> 3)) >> 13;
    // 2^-24 becomes 1, what lies below it is cut off after a random part of it has been added.
    float units = bits<float>(rest < (113u << 23) ? rest : 0u) * 16777216.0f;
    uint32_t denormal = uint32_t(int32_t(units + float(int32_t(random)) * 0x1p-16f));
    return finish(x, rest, normal, denormal);
  }

 private:
  static FUSEDOPT_HD uint32_t finish(float x, uint32_t rest, uint32_t normal, uint32_t denormal) {
    uint32_t r = rest < (113u << 23) ? denormal : normal;
    r = rest >= (143u << 23) ? 0x7c00u : r;                          // 65536 and above
    r = rest > 0x7f800000u ? 0x7e00u | ((rest >> 13) & 0x3ffu) : r;  // NaN
    return ((bits<uint32_t>(x) >> 16) & 0x8000u) | r;
  }
};

// Stochastic rounding: the result is one of the two neighbours, and right on average.
template <class F>
struct Noisy : F {
  static constexpr bool noisy = true;
  static FUSEDOPT_HD uint32_t store(float x, uint32_t random) { return F::store_noisy(x, random); }
};

// --- weights: Residual is what is kept beside the weight; load and store see both ---

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

// A bf16 weight and the 16 bits that follow it, as a signed number: together exactly a float32. The weight is the
// float32 rounded half away from zero (to even would leave 65,537 float32 to one weight).
struct Split16 {
  using Weight = BF16;
  using Residual = int16_t;
  using ResidualWord = uint32_t;
  static constexpr Master master = kSplit16;
  // A weight that somebody has set to 0 or infinity may get a rest that leads out of the numbers: it then has none.
  static FUSEDOPT_HD float join(uint32_t w, uint32_t rest) {
    const float x = bits<float>((w << 16) + rest);
    return x == x ? x : bits<float>(w << 16);
  }
  static FUSEDOPT_HD float load(uint32_t w, uint32_t rest) { return join(w, uint32_t(int32_t(rest << 16) >> 16)); }
  static FUSEDOPT_HD void store(float x, uint32_t& w, uint32_t& rest, uint32_t) {
    const uint32_t b = bits_one_nan(x);
    w = (b + 0x8000u) >> 16;
    rest = b & 0xffffu;
  }
};

// The same with 8 bits: a float32 whose last 8 digits are rounded off, half away from zero.
struct Split8 {
  using Weight = BF16;
  using Residual = int8_t;
  using ResidualWord = int32_t;
  static constexpr Master master = kSplit8;
  static FUSEDOPT_HD float load(uint32_t w, int32_t rest) { return Split16::join(w, uint32_t(rest) << 8); }
  static FUSEDOPT_HD void store(float x, uint32_t& w, int32_t& rest, uint32_t) {
    const uint32_t b = bits_one_nan(x) + 0x80u;
    w = (b + 0x8000u) >> 16;
    rest = int32_t(b >> 8);  // its low 8 bits
  }
};

// A float32 copy, rounded to the weight. It yields to a weight that is no longer its own rounded value.
template <class F>
struct Copied {
  using Weight = F;
  using Residual = float;
  using ResidualWord = float;
  static constexpr Master master = kFloat32;
  static FUSEDOPT_HD float load(uint32_t w, float rest) { return F::store(rest) == w ? rest : F::load(w); }
  static FUSEDOPT_HD void store(float x, uint32_t& w, float& rest, uint32_t) {
    w = F::store(x);
    rest = x;
  }
};

// --- block-quantised states: 8 bits an element and one float32 scale a block, the block's largest magnitude s. A code
// is the square root of an element's share of s, rounded stochastically: fine where most elements lie, near zero. ---

// Added to a small number it rounds it to a whole one, whose low byte is that of the sum's bits.
constexpr float kWhole = 0x1.8p23f;
// A code's shift before it is rounded to nearest, from random bits, the topmost first: a little less than a half either
// way, so that what is some code's stays that code's, and none goes beyond top.
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
  // c: not rounded, shifted; its sign, if it has come to one, does not count.
  static FUSEDOPT_HD uint32_t encode(float c, float x, uint32_t) { return bits<uint32_t>(signed_as(c, x) + kWhole); }
};

// x = s c^2 / 255^2 for a second moment, c in [1, 255], or 0 in a block of zeros: what is divided by must not vanish.
struct Root {
  static constexpr Format format = kU8;
  static constexpr float top = 255.0f;
  static FUSEDOPT_HD float decode(uint8_t code) {
    const int c = code;
    return float(uint16_t(c * c));
  }
  static FUSEDOPT_HD float size(float x) { return x; }
  // The rule has taken this root: where the compiler keeps it there is no other.
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

// Usual scales: below them float32 runs out (zero, denormal, a little above), and what is not finite needs care. A loop
// that has made sure of it says so, and is spared both.
constexpr float kTiny = 0x1p-96f;
FUSEDOPT_HD bool usual(float scale) {
  return bits<uint32_t>(scale) - bits<uint32_t>(kTiny) < 0x7f800000u - bits<uint32_t>(kTiny);
}

// A block's codes into numbers.
template <class C, bool Usual = false>
struct Decoder {
  float unit, rest;
  FUSEDOPT_HD explicit Decoder(float scale)
      : unit((!Usual && scale < kTiny ? 1.0f : scale) * (1.0f / (C::top * C::top))),
        rest(!Usual && scale < kTiny ? scale : 1.0f) {}
  FUSEDOPT_HD float operator()(uint8_t code) const { return C::decode(code) * unit * rest; }
};

// Numbers of a block whose largest magnitude is `size` into codes.
template <class C, bool Usual = false>
struct Encoder {
  float up, inverse;
  uint32_t least;
  FUSEDOPT_HD explicit Encoder(float size)
      : up(!Usual && size < kTiny ? 0x1p64f : 1.0f),
        inverse(!Usual && size == 0.0f ? 0.0f : C::inverse(size * up)),
        least(bits<uint32_t>(kWhole) + (Usual || size != 0.0f ? 1 : 0)) {}
  FUSEDOPT_HD uint8_t operator()(float x, float shift) const {
    const float c = C::shifted(C::size(x) * up, inverse, shift);
    return uint8_t(C::encode(Usual || c == c ? c : 0.0f, x, least));
  }
};

// The bits of a number's magnitude: in the numbers' order, NaN on top.
FUSEDOPT_HD uint32_t size_bits(float x) { return bits<uint32_t>(x) & 0x7fffffffu; }

// Can all states be quantised?
constexpr bool quantisable(const Format* codes, int n) {
  for (int k = 0; k < n; ++k)
    if (codes[k] == kFormats) return false;
  return n > 0;
}

}  // namespace

// The combinations that exist: weight, gradient, state. The rest is refused by name.
#ifdef FUSEDOPT_FEW_FORMATS  // one of each kind, for tools that need no more
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
