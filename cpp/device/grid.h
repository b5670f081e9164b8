// The loop of a device: update.h over chunks of many tensors in one launch. Aligned operands are accessed 16 bytes at a
// time, others element by element; elements beyond the end of a tensor are read as zero and not written. Compiled by
// nvcc, and by any C++ compiler for the simulated device (runtime_*.h define blocks of threads).
#pragma once
#include "device/device.h"
#include "rules/update.h"

namespace fusedopt {
namespace {

FUSEDOPT_DEVICE bool skipped(const DeviceHead& head) { return head.found_inf && *head.found_inf != 0.0f; }

// The factor of gradients before clipping.
FUSEDOPT_DEVICE double unscaling(const DeviceHead& head) {
  return head.grad_scale ? head.unscale / double(*head.grad_scale) : head.unscale;
}

FUSEDOPT_DEVICE double read_number(const void* x, bool wide) {
  return wide ? *static_cast<const double*>(x) : double(*static_cast<const float*>(x));
}
FUSEDOPT_DEVICE void write_number(void* to, bool wide, double x) {
  if (wide) {
    *static_cast<double*>(to) = x;
  } else {
    *static_cast<float*>(to) = float(x);
  }
}

// The offset of element i of an operand.
FUSEDOPT_DEVICE int64_t place(const int64_t* layout, int operand, int64_t i) {
  if (!layout) return i;
  const int64_t dims = *layout;
  const int64_t* shape = layout + 1;
  const int64_t* stride = shape + dims * (1 + operand);
  int64_t at = 0;
  for (int64_t d = dims - 1; d >= 0; --d) {
    at += i % shape[d] * stride[d];
    i /= shape[d];
  }
  return at;
}

// The row of a chunk: the last one that begins at or before it, since empty rows have no chunk.
FUSEDOPT_DEVICE int64_t row_of(const int64_t* firsts, int64_t first_row, int64_t rows, int64_t chunk) {
  int64_t low = first_row, high = first_row + rows;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (firsts[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

// The largest value among `width` neighbouring threads.
template <int threads>
FUSEDOPT_DEVICE uint32_t largest_of(uint32_t x) {
  FUSEDOPT_UNROLL
  for (int distance = 1; distance < threads; distance *= 2) {
    const uint32_t other = uint32_t(exchange(int32_t(x), distance));
    x = other > x ? other : x;
  }
  return x;
}

// Precedes the update, one thread per row: advances the clock and computes the constants of the step.
template <class U>
FUSEDOPT_KERNEL prepare(DeviceTables t, int64_t first, int64_t rows) {
  const int64_t at = block_index() * kThreads + thread_index();
  if (at >= rows || skipped(*t.head)) return;
  DeviceRow& row = t.rows[first + at];
  DeviceReady& ready = t.ready[first + at];
  const DeviceGroup& group = t.groups[row.group];
  double hyper[kMaxHyper];
  for (int h = 0; h < kMaxHyper; ++h) hyper[h] = group.hyper[h];
  if (group.lr) hyper[0] = read_number(group.lr, group.lr_wide);
  Clock clock{row.step ? int64_t(read_number(row.step, row.step_wide)) : row.done,
              row.carry ? read_number(row.carry, row.carry_wide) : 0, row.carry && !row.carry_wide};
  U::advance(hyper, clock);
  if (row.step) {
    write_number(row.step, row.step_wide, double(clock.t));
  } else {
    row.done = clock.t;
  }
  if (row.carry) write_number(row.carry, row.carry_wide, clock.carry);
  double factor = unscaling(*t.head);
  if (t.head->max_norm > 0) factor *= clip_factor(t.head->max_norm, *t.norm * magnitude(factor));
  U::prepare(hyper, clock, group.maximize ? -factor : factor, ready.prepared);
  ready.shrink = hyper[0] * group.l1;
  ready.ema_weight = group.ema_weight;
  ready.key = noise_key(group.seed, clock.t, row.sequence);
}

// How the threads of a block share a chunk. Packed: a thread updates `width` neighbours, in accesses of 16 bytes.
// Otherwise the elements of a thread are a warp apart, so that scalar accesses of a warp are coalesced. `plain`: the
// operands are dense, and neither l1 nor a moving average follows the update.
template <class U, bool packed, bool plain>
struct Grid {
  using W = typename U::W;
  using G = typename U::G;
  using S = typename U::S;
  using P = typename U::P;
  using T = typename U::T;
  using Residual = typename U::Residual;
  using Ready = typename U::Ready;
  static constexpr int N = U::N;
  static constexpr bool wide = sizeof(T) == 8;
  static constexpr bool narrow =
      sizeof(typename P::Stored) < 4 || sizeof(typename G::Stored) < 4 || sizeof(typename S::Stored) < 4;
  // Scalar accesses to a block of codes: each thread of a warp has two elements, and the warp shares the scale.
  static constexpr int width = !packed ? (U::blocked ? kBlock / kWarp : 1) : wide ? 2 : U::blocked || narrow ? 8 : 4;
  static constexpr int stride = packed ? 1 : kWarp, stretch = kThreads * width, sharing = kBlock / width;
  // A range of packed accesses ends at a multiple of this.
  static constexpr uint32_t whole = U::blocked ? kBlock : width;
  template <class Stored>
  struct alignas(sizeof(Stored) * width < 16 ? sizeof(Stored) * width : 16) Pack {
    Stored x[width];
  };
  static constexpr bool kept = W::master != kNoMaster, any_layout = !packed && !plain;
  static constexpr int residual_operand = 2 + N, ema_operand = residual_operand + kept, operands = ema_operand + 1;

  // The elements of a thread: i, i + stride, ..., counted from the start of the chunk.
  struct Place {
    int64_t begin, base;  // the chunk's first element, and its offset
    uint32_t i, end;
    int64_t at[any_layout ? operands : 1][width];  // offsets of each operand's elements

    FUSEDOPT_DEVICE Place(const int64_t* layout, int n_operands, int64_t begin_, uint32_t i_, uint32_t end_)
        : begin(begin_), base(any_layout && layout ? 0 : begin_), i(i_), end(end_) {
      if constexpr (any_layout) {
        FUSEDOPT_UNROLL
        for (int k = 0; k < width; ++k) {
          FUSEDOPT_UNROLL
          for (int o = 0; o < operands; ++o) at[o][k] = layout ? 0 : i + k * stride;
          if (layout) walk(layout, n_operands, k);
        }
      }
    }
    FUSEDOPT_DEVICE void walk(const int64_t* layout, int n_operands, int k) {
      const int64_t dims = *layout;
      int64_t left = number(k);
      FUSEDOPT_ROLLED
      for (int64_t d = dims - 1; d >= 0; --d) {
        const int64_t size = layout[1 + d], index = left % size;
        left /= size;
        FUSEDOPT_UNROLL
        for (int o = 0; o < operands; ++o)
          if (o < n_operands) at[o][k] += index * layout[1 + dims * (1 + o) + d];
      }
    }
    FUSEDOPT_DEVICE int64_t number(int k) const { return begin + i + k * stride; }
    FUSEDOPT_DEVICE bool inside(int k) const { return i + k * stride < end; }
    FUSEDOPT_DEVICE int64_t place(int operand, int k) const {
      if constexpr (any_layout) return at[operand][k];
      return i + k * stride;
    }

    template <class Stored>
    FUSEDOPT_DEVICE void get(int operand, const void* from, Pack<Stored>& to) const {
      auto* x = global(static_cast<const Stored*>(from) + base);
      if constexpr (packed) {
        if (inside(0)) to = *reinterpret_cast<const Pack<Stored>*>(x + i);
      } else {
        FUSEDOPT_UNROLL
        for (int k = 0; k < width; ++k)
          if (inside(k)) to.x[k] = x[place(operand, k)];
      }
    }
    template <class Stored>
    FUSEDOPT_DEVICE void put(int operand, const Pack<Stored>& from, void* to) const {
      auto* x = global(static_cast<Stored*>(to) + base);
      if constexpr (packed) {
        if (inside(0)) *reinterpret_cast<Pack<Stored>*>(x + i) = from;
      } else {
        FUSEDOPT_UNROLL
        for (int k = 0; k < width; ++k)
          if (inside(k)) x[place(operand, k)] = from.x[k];
      }
    }
  };

  struct Elements {
    Pack<typename P::Stored> p;
    Pack<typename G::Stored> g;
    Pack<Residual> residual;
    Pack<typename S::Stored> state[N + 1];

    FUSEDOPT_DEVICE typename W::ResidualWord residual_word(int k) const {
      typename W::ResidualWord r{};
      if constexpr (kept) r = typename W::ResidualWord(residual.x[k]);
      return r;
    }
    FUSEDOPT_DEVICE void set(int k, typename P::Word w, typename W::ResidualWord r) {
      p.x[k] = typename P::Stored(w);
      if constexpr (kept) residual.x[k] = Residual(r);
    }
  };

  static FUSEDOPT_DEVICE void flat(const Ready& ready, uint32_t key, const Place& at, Elements& e) {
    uint32_t both = 0;
    FUSEDOPT_UNROLL
    for (int k = 0; k < width; ++k) {
      uint32_t random = 0;
      if (U::random && packed && k % 2 == 0) both = noise(key, uint32_t(at.number(k) >> 1));
      if (U::random) random = !packed ? noise_at(key, at.number(k)) : k % 2 ? both >> 16 : both & 0xffffu;
      typename P::Word w = e.p.x[k];
      typename W::ResidualWord r = e.residual_word(k);
      typename S::Word s[N + 1];
      FUSEDOPT_UNROLL
      for (int j = 0; j < N; ++j) s[j] = e.state[j].x[k];
      U::element(ready, w, r, e.g.x[k], s, random);
      e.set(k, w, r);
      FUSEDOPT_UNROLL
      for (int j = 0; j < N; ++j) e.state[j].x[k] = typename S::Stored(s[j]);
    }
  }

  // A thread's elements of a block as numbers, and random bits if the form rounds stochastically.
  struct Block {
    int64_t number;
    int first;  // the thread's first element in it
    bool inside;
    T s[N + 1][width];
    uint32_t random[width];
  };

  // Threads that share random numbers compute some of them each and exchange them.
  static FUSEDOPT_DEVICE void draw(uint32_t key, Block& b) {
    if constexpr (packed && U::quantised) {
      constexpr int own = width / U::parts, apart = sharing / U::parts;
      const int thread = b.first / width, part = thread / apart, first = b.first % U::numbers;
      uint32_t some[own];
      FUSEDOPT_UNROLL
      for (int k = 0; k < own; ++k) some[k] = U::block_noise(key, b.number, first + part * own + k);
      FUSEDOPT_UNROLL
      for (int k = 0; k < width; ++k) {
        const int computed_by = thread % apart + k / own * apart;
        b.random[k] = U::part_of(uint32_t(value_of(int32_t(some[k % own]), computed_by, sharing)), part);
      }
    } else {
      FUSEDOPT_UNROLL
      for (int k = 0; k < width; ++k) {
        const int i = b.first + k * stride;
        b.random[k] = U::part_of(U::block_noise(key, b.number, i % U::numbers), i / U::numbers);
      }
    }
  }

  template <int J = 0>
  static FUSEDOPT_DEVICE void decode(const Elements& e, float* const* scale, Block& b) {
    if constexpr (J < N) {
      if constexpr (U::quantised) {
        const Decoder<typename U::template CodeOf<J>> decoder(b.inside ? global(scale[J])[b.number] : 0.0f);
        FUSEDOPT_UNROLL
        for (int k = 0; k < width; ++k) b.s[J][k] = decoder(e.state[J].x[k]);
      } else {
        FUSEDOPT_UNROLL
        for (int k = 0; k < width; ++k) b.s[J][k] = S::load(e.state[J].x[k]);
      }
      decode<J + 1>(e, scale, b);
    }
  }

  static FUSEDOPT_DEVICE void update(const Ready& ready, Elements& e, Block& b) {
    FUSEDOPT_UNROLL
    for (int k = 0; k < width; ++k) {
      typename P::Word w = e.p.x[k];
      typename W::ResidualWord r = e.residual_word(k);
      T x = W::load(w, r), t[N + 1];
      FUSEDOPT_UNROLL
      for (int j = 0; j < N; ++j) t[j] = b.s[j][k];
      apply<N>(ready.rule, x, T(G::load(e.g.x[k]) * ready.scale), t);
      FUSEDOPT_UNROLL
      for (int j = 0; j < N; ++j) b.s[j][k] = t[j];
      W::store(x, w, r, P::noisy ? U::bits_of(b.random[k]) : 0);
      e.set(k, w, r);
    }
  }

  // The largest magnitude of a state in its block. Fast: a negative second moment gives no normal scale.
  template <class C, bool fast>
  static FUSEDOPT_DEVICE float largest(const T* s) {
    uint32_t top = 0;
    FUSEDOPT_UNROLL
    for (int k = 0; k < width; ++k) {
      const uint32_t x = fast ? bits<uint32_t>(C::size(s[k])) : size_bits(s[k]);
      top = x > top ? x : top;
    }
    return bits<float>(largest_of<sharing>(top));
  }
  template <class C, bool fast>
  static FUSEDOPT_DEVICE void encode_as(const T* s, const uint32_t* random, float size, uint8_t* codes) {
    const Encoder<C, fast> encoder(size);
    FUSEDOPT_UNROLL
    for (int k = 0; k < width; ++k) codes[k] = encoder(s[k], U::shift_of(random[k]));
  }
  template <int J = 0>
  static FUSEDOPT_DEVICE void encode(const Block& b, float* const* scale, Elements& e) {
    if constexpr (J < N) {
      if constexpr (U::quantised) {
        using C = typename U::template CodeOf<J>;
        float size = packed ? largest<C, true>(b.s[J]) : 0.0f;
        if (packed && all_of_warp(normal_scale(size))) {
          encode_as<C, packed>(b.s[J], b.random, size, e.state[J].x);
        } else {
          size = largest<C, false>(b.s[J]);
          encode_as<C, false>(b.s[J], b.random, size, e.state[J].x);
        }
        if (b.inside && b.first == 0) global(scale[J])[b.number] = size;
      } else {
        FUSEDOPT_UNROLL
        for (int k = 0; k < width; ++k)
          e.state[J].x[k] = typename S::Stored(S::store(b.s[J][k], S::noisy ? U::bits_of(b.random[k]) : 0));
      }
      encode<J + 1>(b, scale, e);
    }
  }

  // Stores the weights, then applies l1 and the moving average.
  static FUSEDOPT_DEVICE void finish(const DeviceRow& row, const Place& at, uint32_t key, T shrink, T weight,
                                     Elements& e) {
    if (!plain && shrink != T(0)) {
      FUSEDOPT_UNROLL
      for (int k = 0; k < width; ++k) {
        typename P::Word w = e.p.x[k];
        typename W::ResidualWord r = e.residual_word(k);
        U::threshold(shrink, w, r, P::noisy ? noise_at(~key, at.number(k)) : 0);
        e.set(k, w, r);
      }
    }
    at.put(0, e.p, row.param);
    if constexpr (kept) at.put(residual_operand, e.residual, row.residual);
    if (!plain && row.ema) {
      Pack<T> ema{};
      at.get(ema_operand, row.ema, ema);
      FUSEDOPT_UNROLL
      for (int k = 0; k < width; ++k) ema.x[k] = U::average(ema.x[k], e.p.x[k], e.residual_word(k), weight);
      at.put(ema_operand, ema, row.ema);
    }
  }

  // Updates the elements [first, end) of the chunk that begins here.
  static FUSEDOPT_DEVICE void run(const DeviceRow& described, const Ready& ready, const DeviceReady& own,
                                  const void* const& grad, const int64_t* layout, int64_t begin, uint32_t first,
                                  uint32_t end) {
    const uint32_t key = uint32_t(own.key), thread = uint32_t(thread_index());
    const T shrink = T(own.shrink), weight = T(own.ema_weight);
    const uint32_t mine = packed ? thread * width : thread / kWarp * (kWarp * width) + thread % kWarp;
    FUSEDOPT_ROLLED
    for (uint32_t base = first; base < end; base += stretch) {
      const DeviceRow row = described;  // read again: keeping its pointers would cost registers
      const Place at(layout, row.ema ? operands : operands - 1, begin, base + mine, end);
      if (!U::quantised && !at.inside(0)) break;
      Elements e{};
      at.get(0, row.param, e.p);
      at.get(1, grad, e.g);
      FUSEDOPT_UNROLL
      for (int j = 0; j < N; ++j) at.get(2 + j, row.state[j], e.state[j]);
      if constexpr (kept) at.get(residual_operand, row.residual, e.residual);
      if constexpr (U::blocked) {
        Block b;
        b.number = begin / kBlock + at.i / kBlock;
        b.first = int(at.i % kBlock);
        b.inside = at.i - uint32_t(b.first) < end;
        decode(e, row.scale, b);
        if (P::noisy) draw(key, b);
        update(ready, e, b);
        finish(row, at, key, shrink, weight, e);
        if (S::noisy && !P::noisy) draw(key, b);  // not earlier: random bits occupy registers
        encode(b, described.scale, e);
      } else {
        flat(ready, key, at, e);
        finish(row, at, key, shrink, weight, e);
      }
      FUSEDOPT_UNROLL
      for (int j = 0; j < N; ++j) at.put(2 + j, e.state[j], (U::blocked ? described : row).state[j]);
    }
  }
};

// The number of resident blocks per multiprocessor to aim for: as many as leave each thread enough registers for its
// stored operands, its states as numbers, and the arithmetic. `make cuda` fails if registers are spilled.
template <class U>
constexpr int blocks_wanted() {
  using Packed = Grid<U, true, true>;
  constexpr int bytes = int(sizeof(typename U::P::Stored) + sizeof(typename U::G::Stored)) +
                        U::N * int(sizeof(typename U::S::Stored)) + Packed::kept * int(sizeof(typename U::Residual));
  constexpr int words = Packed::width * bytes / 4 + Packed::width * U::N;
  if (U::quantised || Packed::wide) return 3;
  if (Packed::width > 4) return words <= 24 ? 4 : words <= 32 ? 3 : 2;  // conversions need further registers
  return words <= 24 ? 5 : words <= 32 ? 4 : words <= 48 ? 3 : 2;
}

template <class U, bool plain>
FUSEDOPT_DEVICE void update_chunk(const DeviceTables& t, int64_t first_row, int64_t rows, int64_t first_chunk) {
  if (skipped(*t.head)) return;
  using Packed = Grid<U, true, plain>;
  const int64_t chunk = first_chunk + block_index();
  const int64_t r = row_of(t.firsts, first_row, rows, chunk);
  const DeviceRow& row = t.rows[r];
  const int64_t* const layout = !plain && row.layout ? t.words + row.layout : nullptr;
  const int64_t begin = (chunk - t.firsts[r]) * kChunk, left = row.n - begin;
  const uint32_t end = uint32_t(left < kChunk ? left : kChunk);
  const auto ready = *reinterpret_cast<const typename U::Ready*>(t.ready[r].prepared);
  uint32_t done = 0;
  if (plain || row.vector) {
    done = end / Packed::whole * Packed::whole;
    Packed::run(row, ready, t.ready[r], t.grads[r], nullptr, begin, 0, done);
  }
  if (done < end) Grid<U, false, plain>::run(row, ready, t.ready[r], t.grads[r], layout, begin, done, end);
}

template <class U>
FUSEDOPT_KERNEL update(DeviceTables t, int64_t first_row, int64_t rows, int64_t first_chunk) {
  update_chunk<U, false>(t, first_row, rows, first_chunk);
}
template <class U>
FUSEDOPT_UPDATE_KERNEL(blocks_wanted<U>())
update_plain(DeviceTables t, int64_t first_row, int64_t rows, int64_t first_chunk) {
  update_chunk<U, true>(t, first_row, rows, first_chunk);
}

// --- the norm: the CPU's leaves (square_sum in sweep.h) and its tree, padded with zeros to a power of 2 ---

constexpr int kLanes = 16, kLeaves = int(kChunk / kNormBlock), kNormThreads = kLanes * kLeaves, kTreeThreads = 1024;

template <class F>
FUSEDOPT_DEVICE double lane_sum(const void* grad, const int64_t* layout, int64_t begin, int64_t end, int lane) {
  auto* x = static_cast<const typename F::Stored*>(grad);
  double sum = 0;
  for (int64_t i = begin + lane; i < end; i += kLanes) {
    const double v = double(F::load(x[place(layout, 1, i)]));
    sum += v * v;
  }
  return sum;
}

// Sums x[first .. first + n) into x[first]; n is a power of 2. Called by all threads of a block.
FUSEDOPT_DEVICE void pair_up(double* x, int n, int thread, bool halves) {
  for (int width = n / 2; width > 0; width /= 2) {
    block_barrier();
    const int a = halves ? thread : thread * (n / width), b = halves ? thread + width : a + n / width / 2;
    if (thread < width) x[a] += x[b];
  }
  block_barrier();
}

FUSEDOPT_KERNEL sum_chunks(DeviceTables t, int64_t rows) {
  FUSEDOPT_SHARED double lanes[kNormThreads];
  FUSEDOPT_SHARED double leaves[kLeaves];
  const int64_t r = row_of(t.firsts, 0, rows, block_index());
  const DeviceRow& row = t.rows[r];
  const int thread = thread_index(), leaf = thread / kLanes, lane = thread % kLanes;
  const int64_t begin = (block_index() - t.firsts[r]) * kChunk + leaf * kNormBlock;
  const int64_t end = begin + kNormBlock < row.n ? begin + kNormBlock : row.n;
  const void* const grad = t.grads[r];
  const int64_t* const layout = row.layout ? t.words + row.layout : nullptr;
  double sum = 0;
  switch (row.grad) {
    case kF64:
      sum = lane_sum<F64>(grad, layout, begin, end, lane);
      break;
    case kF32:
      sum = lane_sum<F32>(grad, layout, begin, end, lane);
      break;
    case kBF16:
      sum = lane_sum<BF16>(grad, layout, begin, end, lane);
      break;
    default:
      sum = lane_sum<F16>(grad, layout, begin, end, lane);
  }
  lanes[thread] = sum;
  pair_up(lanes + leaf * kLanes, kLanes, lane, true);
  if (lane == 0) leaves[leaf] = lanes[thread];
  pair_up(leaves, kLeaves, thread, false);
  if (thread == 0) t.chunk_sums[block_index()] = leaves[0];
}

// One block per row. Each round of kTreeThreads chunks gives one number, stored where the round began.
FUSEDOPT_BIG_KERNEL(kTreeThreads) sum_rows(DeviceTables t) {
  FUSEDOPT_SHARED double some[kTreeThreads];
  const DeviceRow& row = t.rows[block_index()];
  double* const x = t.chunk_sums + t.firsts[block_index()];
  const int thread = thread_index();
  int64_t step = 1;
  for (int64_t left = (row.n + kChunk - 1) / kChunk; left > 1; left = (left + kTreeThreads - 1) / kTreeThreads) {
    for (int64_t first = 0; first < left; first += kTreeThreads) {
      some[thread] = first + thread < left ? x[(first + thread) * step] : 0.0;
      pair_up(some, kTreeThreads, thread, false);
      if (thread == 0) x[first * step] = some[0];
      block_barrier();
    }
    step *= kTreeThreads;
  }
  if (thread == 0) t.row_sums[row.place] = row.n > 0 ? x[0] : 0.0;
}

// One block, which sums the rows one after the other.
FUSEDOPT_BIG_KERNEL(kTreeThreads) sum_all(DeviceTables t, int64_t rows) {
  FUSEDOPT_SHARED double some[kTreeThreads];
  const int thread = thread_index();
  double sum = 0;
  for (int64_t first = 0; first < rows; first += kTreeThreads) {
    if (first + thread < rows) some[thread] = t.row_sums[first + thread];
    block_barrier();
    for (int k = 0; thread == 0 && k < kTreeThreads && first + k < rows; ++k) sum += some[k];
    block_barrier();
  }
  if (thread != 0) return;
  *t.norm = root(sum);
  if (!t.head->norm) return;
  write_number(t.head->norm, t.head->norm_wide, *t.norm * magnitude(unscaling(*t.head)));
}

template <int size>
struct Words {
  uint64_t word[size];
};
template <int size>
FUSEDOPT_KERNEL write_words(uint64_t* to, Words<size> words, int n) {
  const int i = int(block_index()) * kThreads + thread_index();
  if (i < n) to[i] = words.word[i];
}

}  // namespace
}  // namespace fusedopt
