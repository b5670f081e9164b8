// The loop of a device: update.h over chunks of many tensors in one launch. Every thread works on `width` neighbours,
// in accesses of 16 bytes where all operands are aligned; what lies beyond a tensor's end counts as zero and is not
// written. Compiled by nvcc as CUDA, and by any compiler for the simulated device (runtime_*.h say what a block of
// threads is).
#pragma once
#include "device/device.h"
#include "rules/update.h"

namespace fusedopt {
namespace {

FUSEDOPT_DEVICE bool skipped(const DeviceHead& head) { return head.found_inf && *head.found_inf != 0.0f; }

// What gradients are multiplied by before they are clipped.
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

// Where element i of an operand lies.
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

// The row that a chunk belongs to: the last of these that begins there or before, as rows of no elements have no chunk.
FUSEDOPT_DEVICE int64_t row_of(const int64_t* firsts, int64_t first_row, int64_t rows, int64_t chunk) {
  int64_t low = first_row, high = first_row + rows;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (firsts[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

// The largest over the 8 threads that share a block of codes.
FUSEDOPT_DEVICE uint32_t largest_of_8(uint32_t x) {
  for (int distance = 1; distance < 8; distance *= 2) {
    const uint32_t other = uint32_t(exchange(int32_t(x), distance));
    x = other > x ? other : x;
  }
  return x;
}

// Before the update, a thread for each row: counts the step and computes its constants.
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

template <class U>
struct Grid {
  using W = typename U::W;
  using G = typename U::G;
  using S = typename U::S;
  using P = typename U::P;
  using T = typename U::T;
  using Residual = typename U::Residual;
  using Ready = typename U::Ready;
  static constexpr int N = U::N;
  template <class Stored>
  static constexpr bool narrow = sizeof(Stored) < 4;
  static constexpr int width =
      sizeof(T) == 8                                                                                         ? 2
      : U::blocked || narrow<typename P::Stored> || narrow<typename G::Stored> || narrow<typename S::Stored> ? 8
                                                                                                             : 4;
  template <class Stored>
  struct alignas(sizeof(Stored) * width < 16 ? sizeof(Stored) * width : 16) Pack {
    Stored x[width];
  };
  static constexpr int kSlot = width * int(sizeof(T));
  static constexpr bool kept = W::master != kNoMaster;
  static constexpr int residual_operand = 2 + N, ema_operand = residual_operand + kept;

  // A thread's elements of a row.
  struct Place {
    const int64_t* layout;
    int64_t i, n;
    bool whole;  // in one go
    char* slot;  // this thread's share of the block's memory, for the elements that are not

    template <class Stored>
    FUSEDOPT_DEVICE void get(int operand, const void* from, Pack<Stored>& to) const {
      auto* x = static_cast<const Stored*>(from);
      if (whole) {
        to = *reinterpret_cast<const Pack<Stored>*>(x + i);
        return;
      }
      FUSEDOPT_ROLLED
      for (int k = 0; k < width; ++k) {
        const Stored one = i + k < n ? x[place(layout, operand, i + k)] : Stored(0);
        memcpy(slot + k * int(sizeof one), &one, sizeof one);
      }
      memcpy(&to, slot, sizeof to);
    }
    template <class Stored>
    FUSEDOPT_DEVICE void put(int operand, const Pack<Stored>& from, void* to) const {
      auto* x = static_cast<Stored*>(to);
      if (whole) {
        *reinterpret_cast<Pack<Stored>*>(x + i) = from;
        return;
      }
      memcpy(slot, &from, sizeof from);
      FUSEDOPT_ROLLED
      for (int k = 0; k < width && i + k < n; ++k) {
        Stored one;
        memcpy(&one, slot + k * int(sizeof one), sizeof one);
        x[place(layout, operand, i + k)] = one;
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

  static FUSEDOPT_DEVICE void flat(const Ready& ready, uint32_t key, int64_t i, Elements& e) {
    uint32_t both = 0;
    FUSEDOPT_UNROLL
    for (int k = 0; k < width; ++k) {
      if (U::random && k % 2 == 0) both = noise(key, uint32_t((i + k) >> 1));
      typename P::Word w = e.p.x[k];
      typename W::ResidualWord r = e.residual_word(k);
      typename S::Word s[N + 1];
      FUSEDOPT_UNROLL
      for (int j = 0; j < N; ++j) s[j] = e.state[j].x[k];
      U::element(ready, w, r, e.g.x[k], s, k % 2 ? both >> 16 : both & 0xffffu);
      e.set(k, w, r);
      FUSEDOPT_UNROLL
      for (int j = 0; j < N; ++j) e.state[j].x[k] = typename S::Stored(s[j]);
    }
  }

  template <int J = 0>
  static FUSEDOPT_DEVICE void decode(const Elements& e, float* const* scale, int64_t block, bool inside,
                                     T (*s)[width]) {
    if constexpr (J < N) {
      if constexpr (U::quantised) {
        const Decoder<typename U::template CodeOf<J>> decoder(inside ? scale[J][block] : 0.0f);
        FUSEDOPT_UNROLL
        for (int k = 0; k < width; ++k) s[J][k] = decoder(e.state[J].x[k]);
      } else {
        FUSEDOPT_UNROLL
        for (int k = 0; k < width; ++k) s[J][k] = S::load(e.state[J].x[k]);
      }
      decode<J + 1>(e, scale, block, inside, s);
    }
  }
  template <int J = 0>
  static FUSEDOPT_DEVICE void encode(const T (*s)[width], const uint32_t* random, float* const* scale, int64_t block,
                                     bool first, Elements& e) {
    if constexpr (J < N) {
      if constexpr (U::quantised) {
        uint32_t top = 0;
        FUSEDOPT_UNROLL
        for (int k = 0; k < width; ++k) {
          const uint32_t b = size_bits(s[J][k]);
          top = b > top ? b : top;
        }
        const float size = bits<float>(largest_of_8(top));
        if (first) scale[J][block] = size;
        const Encoder<typename U::template CodeOf<J>> encoder(size);
        FUSEDOPT_UNROLL
        for (int k = 0; k < width; ++k) e.state[J].x[k] = encoder(s[J][k], U::shift_of(random[k]));
      } else {
        FUSEDOPT_UNROLL
        for (int k = 0; k < width; ++k)
          e.state[J].x[k] = typename S::Stored(S::store(s[J][k], S::noisy ? U::bits_of(random[k]) : 0));
      }
      encode<J + 1>(s, random, scale, block, first, e);
    }
  }

  // 8 threads work on a block of codes.
  static FUSEDOPT_DEVICE void blocks(const Ready& ready, uint32_t key, const Place& at, float* const* scale,
                                     Elements& e) {
    T s[N + 1][width];
    uint32_t random[width];
    const int64_t block = at.i / kBlock;
    const int begin = int(at.i % kBlock);
    const bool inside = at.i - begin < at.n;
    decode(e, scale, block, inside, s);
    FUSEDOPT_UNROLL
    for (int k = 0; k < width; ++k) {
      random[k] = 0;
      if (U::random)
        random[k] = U::part_of(U::block_noise(key, block, (begin + k) % U::numbers), (begin + k) / U::numbers);
      typename P::Word w = e.p.x[k];
      typename W::ResidualWord r = e.residual_word(k);
      T x = W::load(w, r), t[N + 1];
      FUSEDOPT_UNROLL
      for (int j = 0; j < N; ++j) t[j] = s[j][k];
      apply<N>(ready.rule, x, T(G::load(e.g.x[k]) * ready.scale), t);
      FUSEDOPT_UNROLL
      for (int j = 0; j < N; ++j) s[j][k] = t[j];
      W::store(x, w, r, P::noisy ? U::bits_of(random[k]) : 0);
      e.set(k, w, r);
    }
    encode(s, random, scale, block, inside && begin == 0, e);
  }

  static FUSEDOPT_DEVICE void run(const DeviceTables& t, int64_t first_row, int64_t rows, int64_t chunk) {
    alignas(16) FUSEDOPT_SHARED char slots[kThreads * kSlot];
    if (skipped(*t.head)) return;
    const int64_t r = row_of(t.firsts, first_row, rows, chunk);
    const DeviceRow row = t.rows[r];
    const void* const grad = t.grads[r];
    const int64_t* const layout = row.layout ? t.words + row.layout : nullptr;
    const DeviceReady& own = t.ready[r];
    const Ready ready = *reinterpret_cast<const Ready*>(own.prepared);
    const uint32_t key = uint32_t(own.key);
    const T shrink = T(own.shrink), weight = T(own.ema_weight);
    const int64_t begin = (chunk - t.firsts[r]) * kChunk, end = begin + kChunk < row.n ? begin + kChunk : row.n;
    for (int64_t base = begin; base < end; base += kThreads * width) {
      const int64_t i = base + int64_t(thread_index()) * width;
      const Place at{layout, i, row.n, row.vector && i + width <= row.n, slots + thread_index() * kSlot};
      Elements e;
      at.get(0, row.param, e.p);
      at.get(1, grad, e.g);
      FUSEDOPT_UNROLL
      for (int j = 0; j < N; ++j) at.get(2 + j, row.state[j], e.state[j]);
      if constexpr (kept) at.get(residual_operand, row.residual, e.residual);
      if constexpr (U::blocked) {
        blocks(ready, key, at, row.scale, e);
      } else {
        flat(ready, key, i, e);
      }
      if (shrink != T(0)) {
        FUSEDOPT_UNROLL
        for (int k = 0; k < width; ++k) {
          typename P::Word w = e.p.x[k];
          typename W::ResidualWord r = e.residual_word(k);
          U::threshold(shrink, w, r, P::noisy ? noise_at(~key, i + k) : 0);
          e.set(k, w, r);
        }
      }
      at.put(0, e.p, row.param);
      FUSEDOPT_UNROLL
      for (int j = 0; j < N; ++j) at.put(2 + j, e.state[j], row.state[j]);
      if constexpr (kept) at.put(residual_operand, e.residual, row.residual);
      if (row.ema) {
        Pack<T> ema;
        at.get(ema_operand, row.ema, ema);
        FUSEDOPT_UNROLL
        for (int k = 0; k < width; ++k) ema.x[k] = U::average(ema.x[k], e.p.x[k], e.residual_word(k), weight);
        at.put(ema_operand, ema, row.ema);
      }
    }
  }
};

template <class U>
FUSEDOPT_KERNEL update(DeviceTables t, int64_t first_row, int64_t rows, int64_t first_chunk) {
  Grid<U>::run(t, first_row, rows, first_chunk + block_index());
}

// --- the norm: the CPU's leaves (square_sum in sweep.h), then its tree, filled up with zeros to a power of 2 ---

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

// x[first .. first + n) becomes x[first]; n is a power of 2. For all threads of a block.
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

// A block for each row. Rounds of kTreeThreads chunks give one number each, kept where the round began.
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

// One block: rows one after the other.
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
