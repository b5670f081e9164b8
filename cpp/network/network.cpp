// See network.h.
#include "network/network.h"

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/float_mode.h"
#include "step/tensor.h"
#include "step/threads.h"

namespace fusedopt {

const NetworkTable* network_baseline();
const NetworkTable* network_avx2();
const NetworkTable* network_avx512();

const NetworkTable& network_table() {
#if defined(FUSEDOPT_X86)
  static const NetworkTable* const tables[] = {network_baseline(), network_avx2(), network_avx512()};
  return *tables[isa_in_use()];
#else
  return *network_baseline();
#endif
}

namespace {

constexpr int64_t kGrain = 16384;  // elements per additional thread

// Calls run(block) for every block, on as many threads as the number of elements justifies.
template <class F>
void in_blocks(int64_t blocks, int64_t elements, int threads, const F& run) {
  int parts = int(std::max<int64_t>(1, std::min<int64_t>({elements / kGrain, threads, blocks})));
  if (parts > 1) parts = int(std::min<int64_t>({blocks, parts * 8, kMaxParts}));
  parallel(Team::kOurs, threads, parts, [&](int part) {
    for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b) run(b);
  });
}

// Buffers that are kept between calls, so that a step allocates nothing.
double* scratch(size_t n) {
  thread_local std::vector<double> kept;
  if (kept.size() < n) kept.resize(n);
  return kept.data();
}

// run(begin, n) returns the sum of a block; the sums are added in the order of blocks.
template <class F>
double sum_blocks(int64_t n, int64_t block, int64_t elements, int threads, const F& run) {
  const int64_t blocks = (n + block - 1) / block;
  double* part = scratch(size_t(blocks));
  in_blocks(blocks, elements, threads, [&](int64_t b) { part[b] = run(b * block, std::min(block, n - b * block)); });
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += part[b];
  return sum;
}

const void* moved(const void* p, int64_t elements, Format f) {
  return p ? static_cast<const char*>(p) + elements * int64_t(size_of(f)) : nullptr;
}
void* moved(void* p, int64_t elements, Format f) {
  return p ? static_cast<char*>(p) + elements * int64_t(size_of(f)) : nullptr;
}

}  // namespace

double run_loss(int loss, Format f, const LossSpan& whole, int threads) {
  auto run = network_table().losses[loss].run[f];
  return sum_blocks(whole.n, kLossBlock, whole.n, threads, [&](int64_t begin, int64_t n) {
    LossSpan s = whole;
    s.begin = begin;
    s.n = n;
    return run(s);
  });
}

int64_t count_unfit(Format f, const void* target, int64_t n, Targets targets, int threads) {
  if (targets == kAnyTarget) return 0;
  auto run = network_table().unfit[f];
  return int64_t(sum_blocks(n, kLossBlock, n / 4, threads, [&](int64_t begin, int64_t count) {
    return double(run(moved(target, begin, f), count, targets));
  }));
}

double run_softmax(Format f, const SoftmaxSpan& whole, int threads) {
  auto run = network_table().softmax[f];
  const int64_t block = std::max<int64_t>(1, kLossBlock / std::max<int64_t>(1, whole.columns));
  return sum_blocks(whole.rows, block, whole.rows * whole.columns, threads, [&](int64_t begin, int64_t n) {
    SoftmaxSpan s = whole;
    const int64_t first = begin * s.columns;
    s.logits = moved(s.logits, first, f);
    s.targets = moved(s.targets, first, f);
    s.weight = moved(s.weight, begin, f);
    s.value = moved(s.value, begin, f);
    s.gradient = moved(s.gradient, first, f);
    if (s.labels) s.labels += begin;
    s.rows = n;
    return run(s);
  });
}

double run_penalty(Format f, const PenaltySpan& whole, int threads) {
  auto run = network_table().penalty[f];
  return sum_blocks(whole.n, kLossBlock, whole.n / 4, threads, [&](int64_t begin, int64_t n) {
    PenaltySpan s = whole;
    s.weights = moved(s.weights, begin, f);
    s.gradient = moved(s.gradient, begin, f);
    s.n = n;
    return run(s);
  });
}

void run_dropout(Format f, const void* x, void* y, int64_t n, const DropoutKey& key, int threads) {
  auto run = network_table().dropout[f];
  const int64_t blocks = (n + kLossBlock - 1) / kLossBlock;
  in_blocks(blocks, n, threads,
            [&](int64_t b) { run(x, y, b * kLossBlock, std::min(kLossBlock, n - b * kLossBlock), key); });
}

void run_layer(LayerLoop loop, Format f, const LayerSpan& whole, int sums_per_column, int threads) {
  const int64_t block = kColumnBlock, blocks = (whole.rows + block - 1) / block;
  const int64_t width = sums_per_column * whole.columns;
  double* part = scratch(size_t(blocks * width));
  in_blocks(blocks, whole.rows * whole.columns, threads, [&](int64_t b) {
    LayerSpan s = whole;
    const int64_t first = b * block * s.columns;
    s.in = moved(s.in, first, f);
    s.other = moved(s.other, first, f);
    s.out = moved(s.out, first, f);
    s.more = moved(s.more, first, f);
    s.rows = std::min(block, whole.rows - b * block);
    s.sums = part + b * width;
    loop(s);
  });
  if (width == 0) return;
  std::fill(whole.sums, whole.sums + width, 0.0);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t c = 0; c < width; ++c) whole.sums[c] += part[b * width + c];
}

}  // namespace fusedopt
