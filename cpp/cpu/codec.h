// Codecs of a form without a rule: decode a span's operands to numbers, and encode them with the rounding and the
// random bits of the kernels. For rules that are data; the kernels of built-in rules contain the same conversions.
#pragma once
#include "library.h"
#include "rules/update.h"

namespace fusedopt {
namespace {

template <class St>
struct Codec {
  using W = typename St::W;
  using G = typename St::G;
  using S = typename St::S;
  using P = typename St::P;
  using T = typename St::T;
  using Residual = typename St::Residual;

  // The random bits of element i of a tensor, if this form uses any: in block forms the top bits, else 16 low bits.
  static FUSEDOPT_HD uint32_t random_at(uint32_t key, int64_t i) {
    if constexpr (!St::random) return 0;
    if constexpr (!St::blocked) return noise_at(key, i);
    const int place = int(i % kBlock);
    return St::part_of(St::block_noise(key, i / kBlock, place % St::numbers), place / St::numbers);
  }
  static FUSEDOPT_HD uint32_t bits16(uint32_t random) { return St::blocked ? St::bits_of(random) : random; }

  static void decode(const Span& span, int n_states, const Format* codes, void* p, void* g, void* const* states) {
    auto* param = static_cast<const typename P::Stored*>(span.param);
    auto* grad = static_cast<const typename G::Stored*>(span.grad);
    auto* residual = static_cast<const Residual*>(span.residual);
    for (int64_t i = 0; i < span.n; ++i) {
      typename W::ResidualWord r{};
      if constexpr (W::master != kNoMaster) r = typename W::ResidualWord(residual[i]);
      static_cast<T*>(p)[i] = W::load(typename P::Word(param[i]), r);
    }
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < span.n; ++i) static_cast<T*>(g)[i] = T(G::load(typename G::Word(grad[i])));
    for (int k = 0; k < n_states; ++k) {
      auto* from = static_cast<const typename S::Stored*>(span.state[k]);
      auto* to = static_cast<T*>(states[k]);
      if constexpr (St::quantised) {
        if (codes[k] == kSigned) decode_blocks<SignedRoot>(from, span.scale[k], span.n, to);
        if (codes[k] == kNonNegative) decode_blocks<Root>(from, span.scale[k], span.n, to);
      } else {
        FUSEDOPT_INDEPENDENT
        for (int64_t i = 0; i < span.n; ++i) to[i] = T(S::load(typename S::Word(from[i])));
      }
    }
  }

  static void encode(const Span& span, int n_states, const Format* codes, const void* p, void* const* states) {
    auto* param = static_cast<typename P::Stored*>(span.param);
    auto* residual = static_cast<Residual*>(span.residual);
    for (int64_t i = 0; i < span.n; ++i) {
      typename P::Word w{};
      typename W::ResidualWord r{};
      W::store(static_cast<const T*>(p)[i], w, r, bits16(random_at(span.key, span.first + i)));
      param[i] = typename P::Stored(w);
      if constexpr (W::master != kNoMaster) residual[i] = Residual(r);
    }
    for (int k = 0; k < n_states; ++k) {
      auto* from = static_cast<const T*>(states[k]);
      auto* to = static_cast<typename S::Stored*>(span.state[k]);
      if constexpr (St::quantised) {
        if (codes[k] == kSigned) encode_blocks<SignedRoot>(span, from, to, span.scale[k]);
        if (codes[k] == kNonNegative) encode_blocks<Root>(span, from, to, span.scale[k]);
      } else {
        for (int64_t i = 0; i < span.n; ++i)
          to[i] = typename S::Stored(S::store(from[i], bits16(random_at(span.key, span.first + i))));
      }
    }
  }

 private:
  template <class C>
  static void decode_blocks(const uint8_t* from, const float* scale, int64_t n, T* to) {
    for (int64_t i = 0; i < n; i += kBlock) {
      const Decoder<C> decoder(scale[i / kBlock]);
      for (int64_t j = i; j < n && j < i + kBlock; ++j) to[j] = decoder(from[j]);
    }
  }
  template <class C>
  static void encode_blocks(const Span& span, const T* from, uint8_t* to, float* scale) {
    for (int64_t i = 0; i < span.n; i += kBlock) {
      uint32_t top = 0;
      for (int64_t j = i; j < span.n && j < i + kBlock; ++j) {
        const uint32_t b = size_bits(from[j]);
        top = b > top ? b : top;
      }
      const float size = bits<float>(top);
      scale[i / kBlock] = size;
      const Encoder<C> encoder(size);
      for (int64_t j = i; j < span.n && j < i + kBlock; ++j)
        to[j] = encoder(from[j], St::shift_of(random_at(span.key, span.first + j)));
    }
  }
};

}  // namespace
}  // namespace fusedopt
