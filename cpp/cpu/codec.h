// Decodes and encodes the operands of a span without a rule, with the rounding and the random bits of the kernels.
// Programs, float32 gradients of 16-bit weights and blocks with unusual scales use it; the kernels of built-in rules do
// the same steps inside their own loops.
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
  using Param = typename P::Stored;
  using State = typename S::Stored;
  static constexpr bool has_random = St::random || St::quantised;

  // The random bits of the elements of a block, as Storage divides them in blocked forms, else 16 for each.
  static FUSEDOPT_HD void draw(uint32_t key, int64_t first, uint32_t* random) {
    if constexpr (St::blocked) {
      St::draw(key, first, random);
    } else {
      for (int i = 0; i < kBlock / 2; ++i) {
        const uint32_t both = noise(key, uint32_t(first >> 1) + uint32_t(i));
        random[2 * i] = both & 0xffffu;
        random[2 * i + 1] = both >> 16;
      }
    }
  }
  static FUSEDOPT_HD uint32_t bits16(uint32_t random) { return St::blocked ? St::bits_of(random) : random; }

  static void decode(const Span& span, int n_states, const Format* codes, void* p, void* g, void* const* states) {
    if (p)
      load_weights(static_cast<const Param*>(span.param), static_cast<const Residual*>(span.residual), span.n,
                   static_cast<T*>(p));
    if (g) load<G>(static_cast<const typename G::Stored*>(span.grad), span.n, static_cast<T*>(g));
    for (int k = 0; k < n_states; ++k) {
      if (!states[k]) continue;
      auto* from = static_cast<const State*>(span.state[k]);
      auto* to = static_cast<T*>(states[k]);
      if constexpr (St::quantised) {
        if (codes[k] == kSigned) decode_blocks<SignedRoot>(from, span.scale[k], span.n, to);
        if (codes[k] == kNonNegative) decode_blocks<Root>(from, span.scale[k], span.n, to);
      } else {
        load<S>(from, span.n, to);
      }
    }
  }

  static void encode(const Span& span, int n_states, const Format* codes, const void* p, void* const* states) {
    auto* from = static_cast<const T*>(p);
    for (int64_t i = 0; i < span.n; i += kBlock) {
      const int64_t n = span.n - i < kBlock ? span.n - i : kBlock;
      uint32_t random[kBlock];
      if (has_random) draw(span.key, span.first + i, random);
      auto* param = static_cast<Param*>(span.param) + i;
      auto* residual = span.residual ? static_cast<Residual*>(span.residual) + i : nullptr;
      if (n == kBlock) {  // a constant number of elements
        encode_block(span, n_states, codes, from + i, states, i, kBlock, param, residual, random);
      } else {
        encode_block(span, n_states, codes, from + i, states, i, n, param, residual, random);
      }
    }
  }

 private:
  static void load_weights(const Param* param, const Residual* residual, int64_t n, T* to) {
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      typename W::ResidualWord r{};
      if constexpr (W::master != kNoMaster) r = typename W::ResidualWord(residual[i]);
      to[i] = W::load(typename P::Word(param[i]), r);
    }
  }
  template <class F>
  static void load(const typename F::Stored* from, int64_t n, T* to) {
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) to[i] = T(F::load(typename F::Word(from[i])));
  }

  static FUSEDOPT_HD void encode_block(const Span& span, int n_states, const Format* codes, const T* p,
                                       void* const* states, int64_t at, int64_t n, Param* param, Residual* residual,
                                       const uint32_t* random) {
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      typename P::Word w{};
      typename W::ResidualWord r{};
      W::store(p[i], w, r, P::noisy ? bits16(random[i]) : 0);
      param[i] = Param(w);
      if constexpr (W::master != kNoMaster) residual[i] = Residual(r);
    }
    float shift[kBlock];
    if constexpr (St::quantised)
      for (int i = 0; i < kBlock; ++i) shift[i] = St::shift_of(random[i]);
    for (int k = 0; k < n_states; ++k) {
      const T* from = static_cast<const T*>(states[k]) + at;
      State* to = static_cast<State*>(span.state[k]) + at;
      if constexpr (St::quantised) {
        float* scale = span.scale[k] + at / kBlock;
        if (codes[k] == kSigned) encode_states<SignedRoot>(from, shift, n, to, scale);
        if (codes[k] == kNonNegative) encode_states<Root>(from, shift, n, to, scale);
      } else {
        FUSEDOPT_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) to[i] = State(S::store(from[i], S::noisy ? bits16(random[i]) : 0));
      }
    }
  }

  template <class C>
  static void decode_blocks(const uint8_t* from, const float* scale, int64_t n, T* to) {
    int64_t i = 0;
    for (; i + kBlock <= n && normal_scale(scale[i / kBlock]); i += kBlock) {
      const Decoder<C, true> decoder(scale[i / kBlock]);
      FUSEDOPT_INDEPENDENT
      for (int j = 0; j < kBlock; ++j) to[i + j] = decoder(from[i + j]);
    }
    for (; i + kBlock <= n; i += kBlock) decode_carefully<C>(from + i, scale[i / kBlock], kBlock, to + i);
    if (i < n) decode_carefully<C>(from + i, scale[i / kBlock], n - i, to + i);
  }
  template <class C>
  static FUSEDOPT_HD void decode_carefully(const uint8_t* from, float scale, int64_t n, T* to) {
    const Decoder<C> decoder(scale);
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) to[i] = decoder(from[i]);
  }

  // Without care for a full block with a normal scale.
  template <class C>
  static FUSEDOPT_HD void encode_states(const T* from, const float* shift, int64_t n, uint8_t* to, float* scale) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t b = bits<uint32_t>(C::size(from[i]));
      top = b > top ? b : top;
    }
    const float size = bits<float>(top);
    if (normal_scale(size) && n == kBlock) {
      *scale = size;
      const Encoder<C, true> encoder(size);
      FUSEDOPT_INDEPENDENT
      for (int i = 0; i < kBlock; ++i) to[i] = encoder(from[i], shift[i]);
    } else if (top == 0) {  // what has had no gradient
      *scale = 0;
      memset(to, 0, size_t(n));
    } else {
      encode_carefully<C>(from, shift, n, to, scale);
    }
  }
  template <class C>
  static FUSEDOPT_APART void encode_carefully(const T* from, const float* shift, int64_t n, uint8_t* to, float* scale) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t b = size_bits(from[i]);
      top = b > top ? b : top;
    }
    *scale = bits<float>(top);
    const Encoder<C> encoder(bits<float>(top));
    for (int64_t i = 0; i < n; ++i) to[i] = encoder(from[i], shift[i]);
  }
};

}  // namespace
}  // namespace fusedopt
