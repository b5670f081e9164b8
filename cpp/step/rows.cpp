// See rows.h.
#include "step/rows.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include <algorithm>
#include <utility>

#include "rules/formats.h"
#include "step/ready.h"

namespace fusedopt {
namespace {

constexpr int kLeadingBits = 11;        // of the row number: the first pass of the sort
constexpr int kDigitBits = 8;           // of each further pass
constexpr int64_t kSortGrain = 8192;    // lookups per additional thread: to sort,
constexpr int64_t kRowGrain = 32768;    // elements: to update
constexpr int64_t kLookupCost = 64;     // cost of accessing a row, in elements
constexpr int64_t kInsertion = 48;      // lookups up to which insertion sort is fastest
constexpr int64_t kLeaf = 256;          // sorted lookups per leaf of the norm's reduction tree
constexpr int64_t kTile = 512;          // elements of a row merged at a time
constexpr int64_t kAhead = 16;          // lookups between a row's prefetch and its update
constexpr int64_t kPrefetched = 512;    // bytes of a row; the hardware prefetcher fetches the rest
constexpr int64_t kManyParts = 262144;  // elements per part if there are more parts than threads
constexpr int kKept = 16;               // step counts of rows whose constants are kept
constexpr float kMostSteps = 1 << 24;   // a float32 counts no further

int bits_for(uint64_t n) {
  int bits = 0;
  for (; n > 0; n >>= 1) ++bits;
  return bits;
}

// The first position of a part of `n`.
int64_t bound(int64_t n, int part, int parts) { return part == parts ? n : int64_t(double(n) * part / parts); }

// Prefetches into the L2 cache: L1 tracks too few outstanding lines.
void fetch(const void* from, int64_t bytes) {
  const auto* at = static_cast<const char*>(from);
  const char* const last = at + std::min(bytes, kPrefetched) - 1;
  for (; at < last; at += 64) prefetch_far(at);
  prefetch_far(last);
}

// Sums of rows stored in one format.
template <class F>
struct Sum {
  using Stored = typename F::Stored;
  using Number = typename F::Number;

  // Elements [first, first + n) of the values of one lookup; copied to `copy` if they are not contiguous.
  static const Stored* values(const Lookups& l, const void* all, int64_t position, int64_t first, int64_t n,
                              Stored* copy) {
    const Stored* row = static_cast<const Stored*>(all) + position * l.stride[1];
    if (l.inner_shape.empty()) return row + first;
    for (int64_t i = 0; i < n; ++i) {
      int64_t rest = first + i, offset = 0;
      for (size_t d = l.inner_shape.size(); d-- > 0; rest /= l.inner_shape[d])
        offset += rest % l.inner_shape[d] * l.inner_stride[d];
      copy[i] = row[offset];
    }
    return copy;
  }

  // Sums these elements over `count` lookups, at `words`. 16-bit values are summed in float32 and rounded once.
  static const void* of(const Lookups& l, const void* all, const uint64_t* words, int64_t count, uint64_t mask,
                        int64_t before, int64_t first, int64_t n, void* out) {
    Stored copy[kTile];
    auto* merged = static_cast<Stored*>(out);
    auto position = [&](int64_t i) { return int64_t(words[i] & mask) - before; };
    const Stored* x = values(l, all, position(0), first, n, merged);
    if (count == 1) return x;
    Number sum[kTile];
    for (int64_t i = 0; i < n; ++i) sum[i] = F::load(x[i]);
    const bool ahead = l.inner_shape.empty();
    for (int64_t k = 1; k < count; ++k) {
      if (ahead && k + kAhead < count)
        fetch(values(l, all, position(k + kAhead), first, n, copy), n * int64_t(sizeof(Stored)));
      const Stored* y = values(l, all, position(k), first, n, copy);
      for (int64_t i = 0; i < n; ++i) sum[i] += F::load(y[i]);
    }
    for (int64_t i = 0; i < n; ++i) merged[i] = Stored(F::store(sum[i]));
    return merged;
  }
};

using Merge = const void* (*)(const Lookups&, const void*, const uint64_t*, int64_t, uint64_t, int64_t, int64_t,
                              int64_t, void*);
Merge merge_of(Format f) {
  return f == kF64 ? Sum<F64>::of : f == kF32 ? Sum<F32>::of : f == kBF16 ? Sum<BF16>::of : Sum<F16>::of;
}

// Sorts words by the `bits` above `shift`. Stable: words that agree there keep the order of their lower bits.
void sort(uint64_t* x, uint64_t* other, int64_t n, int shift, int bits) {
  if (n <= kInsertion) {
    for (int64_t i = 1; i < n; ++i) {
      const uint64_t word = x[i];
      int64_t k = i;
      for (; k > 0 && x[k - 1] > word; --k) x[k] = x[k - 1];
      x[k] = word;
    }
    return;
  }
  const int passes = (bits + kDigitBits - 1) / kDigitBits;
  uint64_t *from = x, *to = other;
  for (int pass = 0; pass < passes; ++pass) {
    const int low = bits * pass / passes, high = bits * (pass + 1) / passes;
    const uint64_t mask = (uint64_t(1) << (high - low)) - 1;
    int64_t start[1 << kDigitBits] = {};
    for (int64_t i = 0; i < n; ++i) ++start[(from[i] >> (shift + low)) & mask];
    for (int64_t digit = 0, sum = 0; digit <= int64_t(mask); ++digit) sum += std::exchange(start[digit], sum);
    for (int64_t i = 0; i < n; ++i) to[start[(from[i] >> (shift + low)) & mask]++] = from[i];
    std::swap(from, to);
  }
  if (from != x) memcpy(x, from, size_t(n) * sizeof *x);
}

}  // namespace

// Shared by the threads that sort. Each part counts its lookups by the leading bits of the row and moves them to their
// buckets; then each bucket is sorted in the cache.
struct RowStep::Grouping {
  const RowStep& step;
  int64_t n;
  int parts, row_bits, leading;
  uint64_t *sorted, *counts;  // counts: 2^leading for each part, in the memory that sorting needs later
  const int64_t* bucket;
  bool in_order[kMaxParts];
  int64_t bad[kMaxParts];  // position among all lookups, or -1
  uint64_t last[kMaxParts], first[kMaxParts];

  int drop() const { return row_bits - leading; }
  int64_t buckets() const { return int64_t(1) << leading; }

  // Calls body(index, table, position) for the lookups of a part, until it returns false. Positions count all tables.
  template <class F>
  void each(int part, F&& body) const {
    const int64_t from = bound(n, part, parts), to = bound(n, part + 1, parts);
    const auto& begin = step.first_;
    size_t t = size_t(std::upper_bound(begin.begin(), begin.end(), from) - begin.begin()) - 1;
    for (int64_t at = from; at < to; ++t) {
      const Lookups& l = *step.tensors[t].rows;
      const int64_t end = std::min(to, begin[t + 1]);
      const bool go_on = l.wide ? walk<int64_t>(l, t, at, end, body) : walk<int32_t>(l, t, at, end, body);
      if (!go_on) return;
      at = end;
    }
  }
  template <class I, class F>
  bool walk(const Lookups& l, size_t t, int64_t at, int64_t end, F&& body) const {
    if (!l.indices) {
      for (; at < end; ++at) body(at - step.first_[t], t, at);
      return true;
    }
    auto* index = static_cast<const I*>(l.indices) + (at - step.first_[t]) * l.index_stride;
    for (; at < end; ++at, index += l.index_stride)
      if (!body(int64_t(*index), t, at)) return false;
    return true;
  }

  void count(int part) {
    uint64_t* const count = counts + int64_t(part) * buckets();
    std::fill(count, count + buckets(), 0);
    uint64_t before = 0;
    bool ordered = true, begun = false;
    const int dropped = drop();
    int64_t wrong = -1;
    each(part, [&](int64_t index, size_t t, int64_t position) {
      if (uint64_t(index) >= uint64_t(step.tensors[t].rows->rows)) {
        wrong = position;
        return false;
      }
      const uint64_t row = step.base_[t] + uint64_t(index);
      if (!begun) first[part] = row;
      begun = true;
      ordered &= row >= before;
      before = row;
      ++count[row >> dropped];
      return true;
    });
    last[part] = before;
    in_order[part] = ordered;
    bad[part] = wrong;
  }

  void divide(int part) const {
    uint64_t* const at = counts + int64_t(part) * buckets();
    const int dropped = drop(), shift = step.position_bits_;
    each(part, [&](int64_t index, size_t t, int64_t position) {
      const uint64_t row = step.base_[t] + uint64_t(index);
      sorted[at[row >> dropped]++] = row << shift | uint64_t(position);
      return true;
    });
  }

  void sort_buckets(int part) const {
    const int64_t* const end = bucket + buckets();
    const int64_t* b = std::lower_bound(bucket, end, bound(n, part, parts));
    const int64_t to = bound(n, part + 1, parts);
    for (; b != end && (*b < to || part + 1 == parts); ++b)
      sort(sorted + b[0], counts + b[0], b[1] - b[0], step.position_bits_, drop());
  }
};

void RowStep::group(Team team, int threads) {
  first_.assign(1, 0);
  base_.assign(1, 0);
  for (const Tensor& t : tensors) {
    first_.push_back(first_.back() + t.rows->n);
    base_.push_back(base_.back() + uint64_t(t.rows->rows));
  }
  const int64_t n = first_.back();
  if (n == 0) return;
  const int row_bits = bits_for(base_.back() > 0 ? base_.back() - 1 : 0);
  position_bits_ = bits_for(uint64_t(n - 1));
  if (row_bits + position_bits_ > 64) throw std::length_error("there are too many lookups for tables of this size");
  Grouping work{*this, n, 0, row_bits, 0, sorted_.get(size_t(n)), other_.get(size_t(n)), nullptr, {}, {}, {}, {}};
  work.parts = int(std::max<int64_t>(1, std::min<int64_t>({n / kSortGrain, threads, kMaxParts})));
  work.leading = std::min({row_bits, kLeadingBits, std::max(0, bits_for(uint64_t(n / work.parts)) - 4)});
  parallel(team, threads, work.parts, [&](int part) { work.count(part); });
  bool ordered = true;
  for (int p = 0; p < work.parts; ++p) {
    if (work.bad[p] >= 0) {
      const size_t t = size_t(std::upper_bound(first_.begin(), first_.end(), work.bad[p]) - first_.begin()) - 1;
      const Lookups& l = *tensors[t].rows;
      const int64_t at = work.bad[p] - first_[t];
      throw BadIndex(t, at,
                     l.wide ? static_cast<const int64_t*>(l.indices)[at * l.index_stride]
                            : static_cast<const int32_t*>(l.indices)[at * l.index_stride]);
    }
    ordered &= work.in_order[p] && (p == 0 || work.last[p - 1] <= work.first[p]);
  }
  bucket_.resize(size_t(work.buckets()) + 1);
  int64_t sum = 0;
  for (int64_t b = 0; b < work.buckets(); ++b) {
    bucket_[size_t(b)] = sum;
    for (int p = 0; p < work.parts; ++p)
      sum += int64_t(std::exchange(work.counts[p * work.buckets() + b], uint64_t(sum)));
  }
  bucket_[size_t(work.buckets())] = sum;
  work.bucket = bucket_.data();
  parallel(team, threads, work.parts, [&](int part) { work.divide(part); });
  if (!ordered) parallel(team, threads, work.parts, [&](int part) { work.sort_buckets(part); });
}

// Shared by the threads of a pass over the sorted lookups.
struct RowStep::Work {
  RowStep& step;
  const std::vector<Group>* groups;
  const uint64_t* words;
  int64_t n;
  int parts;
  double factor;
  double* leaves;

  uint64_t row(int64_t i) const { return words[i] >> step.position_bits_; }
  uint64_t mask() const { return (uint64_t(1) << step.position_bits_) - 1; }

  // Calls body(table, row in it, first lookup, their number) for the rows whose first lookup is within [begin, end).
  template <class F>
  void each(int64_t begin, int64_t end, F&& body) const {
    while (begin > 0 && begin < end && row(begin) == row(begin - 1)) ++begin;
    if (begin >= end) return;
    const auto& base = step.base_;
    size_t t = size_t(std::upper_bound(base.begin(), base.end(), row(begin)) - base.begin()) - 1;
    for (int64_t i = begin; i < end;) {
      const uint64_t r = row(i);
      int64_t next = i + 1;
      while (next < n && row(next) == r) ++next;
      while (r >= base[t + 1]) ++t;
      body(t, int64_t(r - base[t]), i, next - i);
      i = next;
    }
  }

  // The kernel of a table with the constants of the step, and the addresses of the rows of its operands.
  struct Table {
    struct Operand {
      char* data;
      int64_t row, element;  // bytes
      size_t in;             // offset of its pointer in a span
    };
    struct Constants {
      alignas(16) char memory[kPreparedBytes];
      int64_t t = 0;     // the step they are for
    } constants[kKept];  // the first alone where all rows have the same
    Ready ready;
    const Tensor* tensor = nullptr;
    const Group* group = nullptr;
    double scale = 1;
    const Lookups* rows = nullptr;
    Merge merge = nullptr;
    Operand written[kOperands], values;
    int n = 0;
    int64_t before = 0, numbered = 0;
    uint64_t first = 0, end = 0;  // rows, among all
    uint32_t key = 0;

    void open(const Work& work, size_t t) {
      tensor = &work.step.tensors[t];
      rows = tensor->rows;
      before = work.step.first_[t];
      first = work.step.base_[t];
      end = work.step.base_[t + 1];
      group = &(*work.groups)[size_t(tensor->group)];
      scale = group->maximize ? -work.factor : work.factor;
      ready.resolve(tensor->kernel);
      ready.prepare(*tensor, *group, scale, nullptr, constants[0].memory);
      for (Constants& c : constants) c.t = 0;
      key = ready.key(*tensor, *group);
      const Form& f = *ready.form;
      numbered = (rows->width + kBlock - 1) / kBlock * kBlock;  // random numbers and scales belong to whole blocks
      merge = merge_of(ready.grad);
      n = 0;
      add(tensor->span.param, 0, f.param, offsetof(Span, param));
      int operand = 2;
      for (int k = 0; k < ready.n_states; ++k)
        add(tensor->span.state[k], operand++, f.state, offsetof(Span, state) + size_t(k) * sizeof(void*));
      if (tensor->span.residual)
        add(tensor->span.residual, operand++, residual_format(f.master), offsetof(Span, residual));
      if (tensor->span.ema) add(tensor->span.ema, operand, ema_format(f.param), offsetof(Span, ema));
      const auto size = int64_t(size_of(ready.grad));
      values = {static_cast<char*>(const_cast<void*>(tensor->span.grad)), rows->stride[1] * size, size, 0};
    }
    void add(void* data, int operand, Format f, size_t in) {
      const auto size = int64_t(size_of(f));
      written[n++] = {static_cast<char*>(data), rows->stride[operand] * size, size, in};
    }
    bool row_has_constants() const { return rows->steps || rows->sum.at; }
    // Advances a row that has a step count or a sum of its own and prepares its constants. `squares`: the sum of the
    // squares of its gradient, as far as it is needed.
    void prepare_row(int64_t row, double squares) {
      Clock clock = tensor->clock;
      if (rows->steps) {
        float& steps = rows->steps[row];
        clock.t = (steps > 0 ? int64_t(std::min(steps, kMostSteps)) : 0) + 1;
        steps = std::min(float(clock.t), kMostSteps);
      }
      Constants& kept = constants[clock.t % kKept];
      if (rows->sum.at) {
        row_wise_adagrad(row, squares, clock.t, kept.memory);
      } else if (kept.t != clock.t) {
        ready.kernel->prepare(ready.kernel->self, group->hyper.data(), clock, scale, kept.memory);
        kept.t = clock.t;
      }
      ready.constants = kept.memory;
    }
    // s <- s + mean(g^2),  p <- p - lr / (1 + (t - 1) lr_decay) / (sqrt(s) + eps) g, with one s for the row: SGD with a
    // learning rate of the row's own. FBGEMM and TorchRec define it so. The kernel is SGD's, and the hyperparameters
    // are lr, weight_decay (which is 0), lr_decay, eps.
    void row_wise_adagrad(int64_t row, double squares, int64_t t, void* memory) {
      const Scalar sum = {sum_of(row), rows->sum.wide, kHost};
      if (rows->width > 0) sum.set(sum.get() + squares * scale * scale / double(rows->width));
      const double lr = group->hyper[0] / (1 + double(t - 1) * group->hyper[2]);
      const double hyper[] = {lr / (sqrt(sum.get()) + group->hyper[3]), 0};
      ready.kernel->prepare(ready.kernel->self, hyper, tensor->clock, scale, memory);
    }
    char* sum_of(int64_t row) const { return static_cast<char*>(rows->sum.at) + row * rows->sum.size(); }
    void prefetch_row(int64_t row) const {
      if (rows->steps) prefetch_far(rows->steps + row);
      if (rows->sum.at) prefetch_far(sum_of(row));
      for (int k = 0; k < n; ++k) fetch(written[k].data + row * written[k].row, rows->width * written[k].element);
    }
    void prefetch_values(int64_t lookup) const {
      fetch(values.data + lookup * values.row, rows->width * values.element);
    }
    // `grad`: the gradient of the row's elements from `from` on.
    void update(int64_t row, int64_t from, int64_t length, const void* grad) {
      Span span = ready.span(*tensor, key, row * numbered + from, length);
      for (int k = 0; k < n; ++k) {
        void* const at = written[k].data + row * written[k].row + from * written[k].element;
        memcpy(reinterpret_cast<char*>(&span) + written[k].in, &at, sizeof at);
      }
      span.grad = grad;
      ready.run(span);
    }
  };

  void update(int part) const {
    alignas(64) char tile[kTile * sizeof(double)];
    Table table;
    size_t open = step.tensors.size();
    each(bound(n, part, parts), bound(n, part + 1, parts), [&](size_t t, int64_t row_at, int64_t i, int64_t count) {
      if (t != open) table.open(*this, t);
      open = t;
      // Sum::of prefetches the other values of this row.
      for (int64_t k = i + std::max(count, kAhead); k < std::min(n, i + count + kAhead) && row(k) < table.end; ++k) {
        if (row(k) != row(k - 1)) table.prefetch_row(int64_t(row(k) - table.first));
        table.prefetch_values(int64_t(words[k] & mask()) - table.before);
      }
      const int64_t width = table.rows->width;
      if (table.row_has_constants())
        table.prepare_row(row_at, table.rows->sum.at ? squares(0, *table.tensor, table.before, i, count) : 0);
      if (count == 1 && table.rows->inner_shape.empty() && !table.ready.finishes(*table.tensor)) {
        const int64_t lookup = int64_t(words[i] & mask()) - table.before;
        if (width > 0) table.update(row_at, 0, width, table.values.data + lookup * table.values.row);
        return;
      }
      for (int64_t from = 0; from < width; from += kTile) {
        const int64_t length = std::min(kTile, width - from);
        table.update(
            row_at, from, length,
            table.merge(*table.rows, table.values.data, words + i, count, mask(), table.before, from, length, tile));
      }
    });
  }

  // `sum` and the squares of a row's gradient.
  double squares(double sum, const Tensor& tensor, int64_t before, int64_t i, int64_t count) const {
    alignas(64) char tile[kTile * sizeof(double)];
    const Lookups& l = *tensor.rows;
    const Format f = grad_format(tensor.kernel);
    for (int64_t first = 0; first < l.width; first += kTile) {
      const int64_t length = std::min(kTile, l.width - first);
      const void* g = merge_of(f)(l, tensor.span.grad, words + i, count, mask(), before, first, length, tile);
      sum += library().host->square_sum[f](g, length);
    }
    return sum;
  }

  // Leaves are ranges of sorted lookups. A row belongs to the leaf of its first lookup.
  void norm(int part) const {
    const int64_t n_leaves = (n + kLeaf - 1) / kLeaf;
    for (int64_t leaf = bound(n_leaves, part, parts); leaf < bound(n_leaves, part + 1, parts); ++leaf) {
      double sum = 0;
      each(leaf * kLeaf, std::min(n, (leaf + 1) * kLeaf), [&](size_t t, int64_t, int64_t i, int64_t count) {
        sum = squares(sum, step.tensors[t], step.first_[t], i, count);
      });
      leaves[leaf] = sum;
    }
  }
};

void RowStep::split(int threads, int* parts) const {
  int64_t elements = 0;
  for (const Tensor& t : tensors) elements += t.rows->n * (t.rows->width + kLookupCost);
  *parts = int(std::max<int64_t>(1, std::min<int64_t>({elements / kRowGrain, threads, kMaxParts})));
  if (elements / *parts > kManyParts && *parts > 1)
    *parts = int(std::min<int64_t>({*parts * 16, elements / kManyParts, kMaxParts}));
}

double RowStep::norm(Team team, int threads) {
  const int64_t n = first_.back();
  if (n == 0) return 0;
  int parts;
  split(threads, &parts);
  static_assert(sizeof(double) == sizeof(uint64_t), "the leaves reuse the memory of the sort");
  auto* leaves = reinterpret_cast<double*>(other_.get(size_t(n)));
  Work work{*this, nullptr, sorted_.get(size_t(n)), n, parts, 0, leaves};
  parallel(team, threads, parts, [&](int part) { work.norm(part); });
  return sqrt(tree_sum(leaves, (n + kLeaf - 1) / kLeaf));
}

void RowStep::advance(const std::vector<Group>& groups) {
  for (Tensor& t : tensors) t.advance(groups[size_t(t.group)]);
}

void RowStep::update(const std::vector<Group>& groups, double factor, Team team, int threads) {
  const int64_t n = first_.back();
  if (n == 0) return;
  int parts;
  split(threads, &parts);
  Work work{*this, &groups, sorted_.get(size_t(n)), n, parts, factor, nullptr};
  parallel(team, threads, parts, [&](int part) { work.update(part); });
}

}  // namespace fusedopt
