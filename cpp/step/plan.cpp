// See plan.h.
#include "step/plan.h"

#include <math.h>
#include <string.h>

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/float_mode.h"

namespace fusedopt {
namespace {

constexpr int64_t kTile = 512;          // elements of a strided walk that are gathered at a time
constexpr int64_t kRowCost = 32;        // what starting a row costs, in elements
constexpr int64_t kStepGrain = 49152;   // elements worth another thread: to update,
constexpr int64_t kNormGrain = 65536;   // to sum up
constexpr int64_t kLargePart = 262144;  // elements of a part when there are more parts than threads
constexpr int64_t kSplitAlign = 64;
constexpr size_t kLine = 64;  // bytes of a cache line
constexpr int64_t kWorthAligning = 1024;
constexpr int64_t kPiece = 1024;  // elements after which what follows the update is done

// Calls run(offset in memory, done, length) for stretches of `count` elements from logical position `begin`.
template <class U, class F>
void walk(const Strided& s, const int64_t* stride, int64_t begin, int64_t count, F&& run) {
  int64_t index[kMaxDims], offset = 0;
  for (int d = s.ndim - 1; d >= 0; --d) {
    index[d] = begin % s.shape[d];
    begin /= s.shape[d];
    offset += index[d] * stride[d];
  }
  const int last = s.ndim - 1;
  for (int64_t done = 0; done < count;) {
    int64_t length = std::min(s.shape[last] - index[last], count - done);
    run(offset, done, length);
    done += length;
    index[last] += length;
    offset += length * stride[last];
    for (int d = last; d > 0 && index[d] == s.shape[d]; --d) {
      offset += stride[d - 1] - index[d] * stride[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

template <class U>
void gather(const Strided& s, int operand, const void* from, int64_t begin, int64_t count, void* to) {
  const int64_t step = s.stride[operand][s.ndim - 1];
  auto* x = static_cast<const U*>(from);
  auto* y = static_cast<U*>(to);
  walk<U>(s, s.stride[operand], begin, count, [&](int64_t offset, int64_t done, int64_t length) {
    for (int64_t i = 0; i < length; ++i) y[done + i] = x[offset + i * step];
  });
}

template <class U>
void scatter(const Strided& s, int operand, const void* from, int64_t begin, int64_t count, void* to) {
  const int64_t step = s.stride[operand][s.ndim - 1];
  auto* x = static_cast<const U*>(from);
  auto* y = static_cast<U*>(to);
  walk<U>(s, s.stride[operand], begin, count, [&](int64_t offset, int64_t done, int64_t length) {
    for (int64_t i = 0; i < length; ++i) y[offset + i * step] = x[done + i];
  });
}

using Mover = void (*)(const Strided&, int, const void*, int64_t, int64_t, void*);
template <class F8, class F4, class F2, class F1>
Mover by_size(size_t size, F8 f8, F4 f4, F2 f2, F1 f1) {
  return size == 8 ? Mover(f8) : size == 4 ? Mover(f4) : size == 2 ? Mover(f2) : Mover(f1);
}
Mover gather_of(Format f) {
  return by_size(size_of(f), gather<uint64_t>, gather<uint32_t>, gather<uint16_t>, gather<uint8_t>);
}
Mover scatter_of(Format f) {
  return by_size(size_of(f), scatter<uint64_t>, scatter<uint32_t>, scatter<uint16_t>, scatter<uint8_t>);
}

char* moved(void* p, int64_t elements, Format f) { return static_cast<char*>(p) + elements * int64_t(size_of(f)); }
const char* moved(const void* p, int64_t elements, Format f) {
  return static_cast<const char*>(p) + elements * int64_t(size_of(f));
}

// What the rows of a pass have in common.
struct Ready {
  const Loop& loop;
  int n_states;
  const void* prepared;
  Finish finish;

  // A span of a row's operands, or of a tile, without its pointers.
  Span span(const Row& row, uint32_t key, int64_t first, int64_t n) const {
    Span s{};
    s.n = n;
    s.first = first;
    s.key = key;
    for (int k = 0; k < n_states; ++k)
      if (row.span.scale[k]) s.scale[k] = row.span.scale[k] + first / kBlock;
    return s;
  }
  void run(const Span& s) const {
    loop.sweep(prepared, s);
    if (finish.shrink != 0 || s.ema) loop.finish(finish, s);
  }
};

void sweep_dense(const Ready& ready, const Row& row, uint32_t key, int64_t begin, int64_t end) {
  const Form& f = ready.loop.form;
  auto sweep = [&](int64_t from, int64_t to) {
    Span s = ready.span(row, key, from, to - from);
    s.param = moved(row.span.param, from, f.param);
    s.grad = moved(row.span.grad, from, f.grad);
    for (int k = 0; k < ready.n_states; ++k) s.state[k] = moved(row.span.state[k], from, f.state);
    if (row.span.rest) s.rest = moved(row.span.rest, from, rest_format(f.master));
    if (row.span.ema) s.ema = moved(row.span.ema, from, ema_format(f.param));
    ready.run(s);
  };
  if (ready.finish.shrink != 0 || row.span.ema) {  // a piece that stays in the cache between the two loops
    for (; begin < end; begin += kPiece) sweep(begin, std::min(begin + kPiece, end));
    return;
  }
  // NumPy's large arrays all begin 16 bytes past a cache line: a short start of its own brings the rest onto lines.
  const auto address = reinterpret_cast<uintptr_t>(moved(row.span.param, begin, f.param));
  const int64_t head = ready.loop.counts ? 0 : int64_t((kLine - address % kLine) % kLine / size_of(f.param));
  if (head > 0 && end - begin >= kWorthAligning) {
    sweep(begin, begin + head);
    begin += head;
  }
  sweep(begin, end);
}

void sweep_strided(const Ready& ready, const Row& row, uint32_t key, int64_t begin, int64_t end) {
  alignas(64) char tile[kOperands][kTile * sizeof(double)];
  const Form& f = ready.loop.form;
  struct Operand {
    void* data;
    Format format;
  } operands[kOperands] = {{row.span.param, f.param}, {const_cast<void*>(row.span.grad), f.grad}};
  int n = 2;
  for (int k = 0; k < ready.n_states; ++k) operands[n++] = {row.span.state[k], f.state};
  if (row.span.rest) operands[n++] = {row.span.rest, rest_format(f.master)};
  if (row.span.ema) operands[n++] = {row.span.ema, ema_format(f.param)};
  for (; begin < end; begin += kTile) {
    Span s = ready.span(row, key, begin, std::min(kTile, end - begin));
    s.param = tile[0];
    s.grad = tile[1];
    for (int k = 0; k < ready.n_states; ++k) s.state[k] = tile[2 + k];
    if (row.span.rest) s.rest = tile[2 + ready.n_states];
    if (row.span.ema) s.ema = tile[n - 1];
    for (int o = 0; o < n; ++o) gather_of(operands[o].format)(*row.strided, o, operands[o].data, begin, s.n, tile[o]);
    ready.run(s);
    for (int o = 0; o < n; ++o)
      if (o != 1) scatter_of(operands[o].format)(*row.strided, o, tile[o], begin, s.n, operands[o].data);
  }
}

double block_sum(const Table& t, const Row& row, int64_t begin, int64_t n) {
  Format f = t.kernels[row.kernel].loops[row.loop].form.grad;
  if (!row.strided) return t.square_sum[f](moved(row.span.grad, begin, f), n);
  alignas(64) char tile[kNormBlock * sizeof(double)];
  gather_of(f)(*row.strided, 1, row.span.grad, begin, n, tile);
  return t.square_sum[f](tile, n);
}

// Adds pairs of neighbours until one is left: a tree whose shape depends on n alone.
double tree_sum(double* x, int64_t n) {
  for (; n > 1; n = (n + 1) / 2)
    for (int64_t i = 0; i < n / 2 + n % 2; ++i) x[i] = 2 * i + 1 < n ? x[2 * i] + x[2 * i + 1] : x[2 * i];
  return n ? x[0] : 0;
}

}  // namespace

// What the threads of one pass share. Positions count elements, and kRowCost more for every row.
struct Plan::Work {
  const Plan& plan;
  const Table& table;
  int64_t total;
  int parts;
  double* partial;

  int64_t bound(int part) const { return int64_t(double(total) * part / parts); }

  // Calls body(row, begin, end) for the rows and elements that fall to a part.
  template <class F>
  void each(int part, int64_t align, F&& body) const {
    const int64_t from = bound(part), to = part + 1 == parts ? total : bound(part + 1);
    const auto& first = plan.begin_;
    size_t r = size_t(std::upper_bound(first.begin(), first.end(), from) - first.begin()) - 1;
    for (; r < plan.rows.size() && first[r] < to; ++r) {
      const int64_t n = plan.rows[r].span.n;
      auto element = [&](int64_t position) {
        int64_t e = position - first[r];
        return e <= 0 ? 0 : e >= n ? n : e / align * align;
      };
      int64_t begin = element(from), end = to >= first[r + 1] ? n : element(to);
      if (begin < end) body(r, begin, end);
    }
  }

  void sweep(int part) const {
    alignas(16) char constants[kPreparedBytes];
    const Row* prepared = nullptr;
    each(part, kSplitAlign, [&](size_t r, int64_t begin, int64_t end) {
      const Row& row = plan.rows[r];
      if (r + 4 < plan.rows.size()) prefetch_row(plan.rows[r + 4]);
      const Kernel& kernel = table.kernels[row.kernel];
      const Loop& loop = kernel.loops[row.loop];
      const Group& group = plan.groups[size_t(row.group)];
      if (!prepared || prepared->group != row.group || prepared->kernel != row.kernel || prepared->loop != row.loop ||
          prepared->clock.t != row.clock.t || prepared->clock.carry != row.clock.carry) {
        loop.prepare(group.hyper.data(), row.clock, plan.scale_[size_t(row.group)], constants);
        prepared = &row;
      }
      const Ready ready{loop, kernel.n_states, constants, {group.hyper[0] * group.l1, group.ema_weight}};
      const uint32_t key = loop.counts ? noise_key(group.seed, row.clock.t, row.stream) : 0;
      (row.strided ? sweep_strided : sweep_dense)(ready, row, key, begin, end);
    });
  }

  // The first lines of a row to come: small rows are over before the processor's own prefetching has begun.
  static void prefetch_row(const Row& row) {
    for (int n = 0; n < 4 && n * 16 < row.span.n; ++n) {
      prefetch(line(row.span.param, n));
      prefetch(line(row.span.grad, n));
      for (const void* s : row.span.state) prefetch(line(s, n));
    }
  }

  void norm(int part) const {
    each(part, kNormBlock, [&](size_t r, int64_t begin, int64_t end) {
      double* out = partial + first_block(r);
      for (int64_t b = begin; b < end; b += kNormBlock)
        out[b / kNormBlock] = block_sum(table, plan.rows[r], b, std::min(kNormBlock, plan.rows[r].span.n - b));
    });
  }

  // Every row owns one leaf for each block that it starts; a row's leaves begin after those of the rows before it.
  int64_t first_block(size_t r) const { return plan.begin_[r] / kNormBlock + int64_t(r); }
};

int64_t Plan::split(int64_t grain, int threads, int* parts) {
  begin_.resize(rows.size() + 1);
  int64_t total = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    begin_[r] = total;
    total += rows[r].span.n + kRowCost;
  }
  begin_[rows.size()] = total;
  const int64_t elements = total - kRowCost * int64_t(rows.size());
  // As many parts as threads; of a large plan more, for the threads that another process does not hold up.
  *parts = int(std::max<int64_t>(1, std::min<int64_t>({elements / grain, threads, kMaxParts})));
  if (elements / *parts > kLargePart) *parts = int(std::min<int64_t>({*parts * 16, elements / kLargePart, kMaxParts}));
  return total;
}

double Plan::norm(Team team, int threads) {
  const Table& t = table();
  FloatMode mode;
  int parts;
  int64_t total = split(kNormGrain, threads, &parts);
  partial_.assign(size_t(total / kNormBlock) + rows.size() + 1, 0.0);
  Work work{*this, t, total, parts, partial_.data()};
  parallel(
      team, threads, parts,
      [](void* w, int part) {
        FloatMode inner;
        static_cast<Work*>(w)->norm(part);
      },
      &work);
  double sum = 0;
  for (size_t r = 0; r < rows.size(); ++r)
    sum += tree_sum(partial_.data() + work.first_block(r), (rows[r].span.n + kNormBlock - 1) / kNormBlock);
  return sqrt(sum);
}

double Plan::run(const Scaling& scaling, Team team, int threads) {
  const Table& t = table();
  FloatMode mode;
  double result = -1, factor = scaling.unscale;
  if (scaling.max_norm > 0) {
    result = norm(team, threads) * fabs(scaling.unscale);
    factor *= clip_factor(scaling.max_norm, result);
  }
  scale_.resize(groups.size());
  for (size_t g = 0; g < groups.size(); ++g) scale_[g] = groups[g].maximize ? -factor : factor;
  int parts;
  int64_t total = split(kStepGrain, threads, &parts);
  Work work{*this, t, total, parts, nullptr};
  parallel(
      team, threads, parts,
      [](void* w, int part) {
        FloatMode inner;
        static_cast<Work*>(w)->sweep(part);
      },
      &work);
  return result;
}

int find_loop(const Kernel& kernel, const Form& form) {
  for (int i = 0; i < kernel.n_loops; ++i) {
    const Loop& l = kernel.loops[i];
    Form f = form;
    if (kernel.n_states == 0) {
      f.state = l.form.state;
      f.noisy_state = l.form.noisy_state;
    }
    if (l.prepare && l.form == f) return i;
  }
  return -1;
}

size_t size_of(Format f) { return f == kF64 ? 8 : f == kF32 ? 4 : f == kI8 || f == kU8 ? 1 : 2; }

Format rest_format(Master m) { return m == kSplit16 ? kI16 : m == kSplit8 ? kI8 : kF32; }
Format ema_format(Format param) { return param == kF64 ? kF64 : kF32; }

const char* name_of(Format f) {
  static const char* const names[] = {"float64", "float32", "bfloat16", "float16", "int16", "int8", "uint8"};
  return names[f];
}

const char* name_of(Master m) {
  static const char* const names[] = {"", "split16", "split8", "float32"};
  return names[m];
}

}  // namespace fusedopt
