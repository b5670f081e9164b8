// See host.h.
#include "step/host.h"

#include <math.h>
#include <string.h>

#include <algorithm>

#include "step/ready.h"

namespace fusedopt {
namespace {

constexpr int64_t kTile = 512;          // elements that a strided traversal gathers at a time
constexpr int64_t kTensorCost = 32;     // the cost of starting a tensor, in elements
constexpr int64_t kStepGrain = 49152;   // elements per additional thread: in an update,
constexpr int64_t kNormGrain = 65536;   // in a norm
constexpr int64_t kLargePart = 262144;  // elements per part if there are more parts than threads
constexpr int64_t kSplitAlign = 64;
constexpr size_t kLine = 64;  // bytes of a cache line
constexpr int64_t kWorthAligning = 1024;
constexpr int64_t kPiece = 1024;  // elements between the update and what follows it

// Calls run(offset in memory, done, length) for contiguous runs of `count` elements from logical position `begin`.
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

// The elements [from, to) of a dense tensor.
Span dense_part(const Ready& ready, const Tensor& tensor, uint32_t key, int64_t from, int64_t to) {
  Span whole = tensor.span;
  whole.first = 0;
  whole.key = key;
  return ready.part(whole, from, to - from);
}

void update_dense(const Ready& ready, const Tensor& tensor, uint32_t key, int64_t begin, int64_t end) {
  const Form& f = *ready.form;
  auto update = [&](int64_t from, int64_t to) { ready.run(dense_part(ready, tensor, key, from, to)); };
  if (ready.finishes(tensor)) {  // in pieces that stay in the cache between the two loops
    for (; begin < end; begin += kPiece) update(begin, std::min(begin + kPiece, end));
    return;
  }
  // NumPy's large arrays begin 16 bytes after a cache line: a short first span aligns the remainder to lines.
  const auto address = reinterpret_cast<uintptr_t>(moved(tensor.span.param, begin, f.param));
  const int64_t head = ready.form->counts() ? 0 : int64_t((kLine - address % kLine) % kLine / size_of(f.param));
  if (head > 0 && end - begin >= kWorthAligning) {
    update(begin, begin + head);
    begin += head;
  }
  update(begin, end);
}

// Gathers the elements [begin, end) tile by tile, calls run(span) for each, and if `write` puts the results back.
template <class Run>
void walk_strided(const Ready& ready, const Tensor& tensor, uint32_t key, int64_t begin, int64_t end, Run&& run,
                  bool write) {
  alignas(64) char tile[kOperands][kTile * sizeof(double)];
  const Form& f = *ready.form;
  struct Operand {
    void* data;
    Format format;
  } operands[kOperands] = {{tensor.span.param, f.param}, {const_cast<void*>(tensor.span.grad), ready.grad}};
  int n = 2;
  for (int k = 0; k < ready.n_states; ++k) operands[n++] = {tensor.span.state[k], f.state};
  if (tensor.span.residual) operands[n++] = {tensor.span.residual, residual_format(f.master)};
  if (tensor.span.ema) operands[n++] = {tensor.span.ema, ema_format(f.param)};
  for (; begin < end; begin += kTile) {
    Span s = ready.span(tensor, key, begin, std::min(kTile, end - begin));
    s.param = tile[0];
    s.grad = tile[1];
    for (int k = 0; k < ready.n_states; ++k) s.state[k] = tile[2 + k];
    if (tensor.span.residual) s.residual = tile[2 + ready.n_states];
    if (tensor.span.ema) s.ema = tile[n - 1];
    for (int o = 0; o < n; ++o)
      gather_of(operands[o].format)(*tensor.strided, o, operands[o].data, begin, s.n, tile[o]);
    run(s);
    for (int o = 0; write && o < n; ++o)
      if (o != 1) scatter_of(operands[o].format)(*tensor.strided, o, tile[o], begin, s.n, operands[o].data);
  }
}

void update_strided(const Ready& ready, const Tensor& tensor, uint32_t key, int64_t begin, int64_t end) {
  walk_strided(ready, tensor, key, begin, end, [&](const Span& s) { ready.run(s); }, true);
}

// Adds the elements of one leaf to the sums of a pass.
void add_block(const Ready& ready, const Tensor& tensor, int64_t begin, int64_t end, double* lanes) {
  auto add = [&](const Span& s) { ready.add(s, lanes); };
  if (tensor.strided) {
    walk_strided(ready, tensor, 0, begin, end, add, false);
  } else {
    add(dense_part(ready, tensor, 0, begin, end));
  }
}

// The sum of the lanes of a leaf, in a fixed tree; the lanes are used up.
double lane_sum(double* lane) {
  for (int width = kSumLanes / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) lane[k] += lane[k + width];
  return lane[0];
}

// The number of a pass's first sum.
int first_sum(const Reduction& reduction, int pass) {
  int first = 0;
  for (int p = 0; p < pass; ++p) first += reduction.n_sums[p];
  return first;
}

double block_sum(const HostTable& t, const Tensor& tensor, int64_t begin, int64_t n) {
  const Format f = grad_format(tensor.kernel);
  if (!tensor.strided) return t.square_sum[f](moved(tensor.span.grad, begin, f), n);
  alignas(64) char tile[kNormBlock * sizeof(double)];
  gather_of(f)(*tensor.strided, 1, tensor.span.grad, begin, n, tile);
  return t.square_sum[f](tile, n);
}

}  // namespace

// Shared by the threads of one pass. Positions count elements, plus kTensorCost per tensor.
struct HostStep::Work {
  const HostStep& step;
  const std::vector<Group>* groups;
  int64_t total;
  int parts;
  double* partial;

  int64_t bound(int part) const { return int64_t(double(total) * part / parts); }

  // Calls body(tensor, begin, end) for the tensors and elements of a part.
  template <class F>
  void each(int part, int64_t align, F&& body) const {
    const int64_t from = bound(part), to = part + 1 == parts ? total : bound(part + 1);
    const auto& first = step.begin_;
    size_t r = size_t(std::upper_bound(first.begin(), first.end(), from) - first.begin()) - 1;
    for (; r < step.tensors.size() && first[r] < to; ++r) {
      const int64_t n = step.tensors[r].span.n;
      auto element = [&](int64_t position) {
        int64_t e = position - first[r];
        return e <= 0 ? 0 : e >= n ? n : e / align * align;
      };
      int64_t begin = element(from), end = to >= first[r + 1] ? n : element(to);
      if (begin < end) body(r, begin, end);
    }
  }

  void update(int part) const {
    alignas(16) char constants[kPreparedBytes];
    Ready ready;
    const Tensor* last = nullptr;
    each(part, kSplitAlign, [&](size_t r, int64_t begin, int64_t end) {
      const Tensor& tensor = step.tensors[r];
      if (r + 4 < step.tensors.size()) prefetch_tensor(step.tensors[r + 4]);
      const Group& group = (*groups)[size_t(tensor.group)];
      if (!last || last->group != tensor.group || !(last->kernel == tensor.kernel) || last->clock.t != tensor.clock.t ||
          last->clock.carry != tensor.clock.carry || ready.kernel->reduction) {
        if (!last || !(last->kernel == tensor.kernel)) ready.resolve(tensor.kernel);
        const double* sums = step.sums_.empty() ? nullptr : step.sums_.data() + r * kSumRow;
        ready.prepare(tensor, group, step.scale_[size_t(tensor.group)], sums, constants);
        last = &tensor;
      }
      (tensor.strided ? update_strided : update_dense)(ready, tensor, ready.key(tensor, group), begin, end);
    });
  }

  // Prefetches the first lines of a later tensor: small tensors end before the hardware prefetcher has started.
  static void prefetch_tensor(const Tensor& tensor) {
    for (int n = 0; n < 4 && n * 16 < tensor.span.n; ++n) {
      prefetch(line(tensor.span.param, n));
      prefetch(line(tensor.span.grad, n));
      for (const void* s : tensor.span.state) prefetch(line(s, n));
    }
  }

  // One pass of the reductions: a leaf for each sum and block.
  void reduce(int part, int pass, int64_t leaves) const {
    alignas(16) char constants[kPreparedBytes];
    each(part, kNormBlock, [&](size_t r, int64_t begin, int64_t end) {
      const Tensor& tensor = step.tensors[r];
      const Group& group = (*groups)[size_t(tensor.group)];
      Ready ready;
      ready.resolve(tensor.kernel);
      const Reduction* reduction = ready.kernel->reduction;
      if (!reduction || pass >= reduction->n_passes) return;
      const double* row = step.sums_.data() + r * kSumRow;
      reduction->prepare(ready.kernel->self, pass, group.hyper.data(), tensor.clock, step.scale_[size_t(tensor.group)],
                         row, int64_t(row[kMaxSums]), constants);
      ready.constants = constants;
      double* out = partial + first_block(r);
      for (int64_t b = begin; b < end; b += kNormBlock) {
        double lanes[kMaxSums * kSumLanes] = {};
        add_block(ready, tensor, b, std::min(b + kNormBlock, tensor.span.n), lanes);
        for (int s = 0; s < reduction->n_sums[pass]; ++s)
          out[s * leaves + b / kNormBlock] = lane_sum(lanes + s * kSumLanes);
      }
    });
  }

  void norm(int part) const {
    each(part, kNormBlock, [&](size_t r, int64_t begin, int64_t end) {
      double* out = partial + first_block(r);
      for (int64_t b = begin; b < end; b += kNormBlock)
        out[b / kNormBlock] =
            block_sum(*library().host, step.tensors[r], b, std::min(kNormBlock, step.tensors[r].span.n - b));
    });
  }

  // Every tensor has one leaf per block it begins, after the leaves of the tensors before it.
  int64_t first_block(size_t r) const { return step.begin_[r] / kNormBlock + int64_t(r); }
};

int64_t HostStep::split(int64_t grain, int threads, int* parts) {
  begin_.resize(tensors.size() + 1);
  int64_t total = 0;
  for (size_t r = 0; r < tensors.size(); ++r) {
    begin_[r] = total;
    total += tensors[r].span.n + kTensorCost;
  }
  begin_[tensors.size()] = total;
  const int64_t elements = total - kTensorCost * int64_t(tensors.size());
  // As many parts as threads; more for large steps, so that threads delayed by other processes have less to do.
  *parts = int(std::max<int64_t>(1, std::min<int64_t>({elements / grain, threads, kMaxParts})));
  if (elements / *parts > kLargePart) *parts = int(std::min<int64_t>({*parts * 16, elements / kLargePart, kMaxParts}));
  return total;
}

double HostStep::norm(Team team, int threads) {
  FloatMode mode;
  int parts;
  int64_t total = split(kNormGrain, threads, &parts);
  partial_.assign(size_t(total / kNormBlock) + tensors.size() + 1, 0.0);
  Work work{*this, nullptr, total, parts, partial_.data()};
  parallel(team, threads, parts, [&](int part) { work.norm(part); });
  double sum = 0;
  for (size_t r = 0; r < tensors.size(); ++r)
    sum += tree_sum(partial_.data() + work.first_block(r), (tensors[r].span.n + kNormBlock - 1) / kNormBlock);
  return sqrt(sum);
}

void HostStep::reduce(const std::vector<Group>& groups, Team team, int threads, const CompleteSums& complete) {
  int passes = 0;
  for (size_t r = 0; r < tensors.size(); ++r) {
    if (r > 0 && tensors[r].kernel == tensors[r - 1].kernel) continue;
    const Reduction* reduction = host_kernel(tensors[r].kernel).reduction;
    if (reduction) passes = std::max(passes, reduction->n_passes);
  }
  if (passes == 0) return;
  int parts;
  const int64_t total = split(kNormGrain, threads, &parts), leaves = total / kNormBlock + int64_t(tensors.size()) + 1;
  partial_.assign(size_t(leaves) * kMaxSums, 0.0);
  sums_.assign(tensors.size() * kSumRow, 0.0);
  for (size_t r = 0; r < tensors.size(); ++r) sums_[r * kSumRow + kMaxSums] = double(tensors[r].span.n);
  Work work{*this, &groups, total, parts, partial_.data()};
  for (int pass = 0; pass < passes; ++pass) {
    parallel(team, threads, parts, [&](int part) { work.reduce(part, pass, leaves); });
    for (size_t r = 0; r < tensors.size(); ++r) {
      const Reduction* reduction = host_kernel(tensors[r].kernel).reduction;
      if (!reduction || pass >= reduction->n_passes) continue;
      const int first = first_sum(*reduction, pass);
      const int64_t blocks = (tensors[r].span.n + kNormBlock - 1) / kNormBlock;
      for (int s = 0; s < reduction->n_sums[pass]; ++s)
        sums_[r * kSumRow + size_t(first + s)] = tree_sum(partial_.data() + s * leaves + work.first_block(r), blocks);
    }
    if (complete) complete_pass(pass, complete);
  }
}

void HostStep::complete_pass(int pass, const CompleteSums& complete) {
  std::vector<size_t> which;
  std::vector<double> rows;
  auto each_new = [&](size_t r, auto&& visit) {  // the places in a row that are new in this pass
    const Reduction& reduction = *host_kernel(tensors[r].kernel).reduction;
    const int first = first_sum(reduction, pass);
    for (int s = first; s < first + reduction.n_sums[pass]; ++s) visit(size_t(s));
    if (pass == 0) visit(size_t(kMaxSums));
  };
  for (size_t r = 0; r < tensors.size(); ++r) {
    const Reduction* reduction = host_kernel(tensors[r].kernel).reduction;
    if (!reduction || pass >= reduction->n_passes) continue;
    which.push_back(r);
    rows.resize(which.size() * kSumRow);
    each_new(r, [&](size_t s) { rows[(which.size() - 1) * kSumRow + s] = sums_[r * kSumRow + s]; });
  }
  complete(which, rows.data());
  for (size_t i = 0; i < which.size(); ++i)
    each_new(which[i], [&](size_t s) { sums_[which[i] * kSumRow + s] = rows[i * kSumRow + s]; });
}

void HostStep::advance(const std::vector<Group>& groups) {
  for (Tensor& t : tensors) t.advance(groups[size_t(t.group)]);
}

void HostStep::update(const std::vector<Group>& groups, double factor, Team team, int threads,
                      const CompleteSums& complete) {
  FloatMode mode;
  scale_.resize(groups.size());
  for (size_t g = 0; g < groups.size(); ++g) scale_[g] = groups[g].maximize ? -factor : factor;
  reduce(groups, team, threads, complete);
  int parts;
  int64_t total = split(kStepGrain, threads, &parts);
  Work work{*this, &groups, total, parts, nullptr};
  parallel(team, threads, parts, [&](int part) { work.update(part); });
}

}  // namespace fusedopt
