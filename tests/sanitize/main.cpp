// The core under the sanitizers, without Python: every kernel and combination of formats on every instruction set, odd
// lengths and offsets, many tensors, strided rows, the norm pass, and several threads stepping at once. Each operand
// lies in a heap block of exactly its size, so that one element too many is seen. What is compared is only that all
// ways of running give the same bytes; that these are right is shown by the Python tests. Built by run.sh.
// With --digest it prints a hash of the results of every rule and form, and of the losses and layers, for comparisons
// of compilers and processors: tests/arm/run.sh.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/programs.h"
#include "network/linear.h"
#include "rules/update.h"
#include "step/step.h"
#include "step/threads.h"

using namespace fusedopt;

namespace {

std::atomic<int> failures{0};

void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  fprintf(stderr, "FAILED: %s\n", what.c_str());
}

struct Random {
  uint64_t x;
  uint32_t next() { return uint32_t((x = x * 6364136223846793005u + 1442695040888963407u) >> 33); }
};

// A number in [0.5, 0.63): finite in every format, a possible value of any state, and no variance comes out negative:
// where two NaNs of different sign meet, which one is kept is not promised.
void put(char* at, Format f, Random& r) {
  uint32_t digits = r.next();
  if (f == kF64) {
    double x = 0.5 + digits * 0x1p-34;
    memcpy(at, &x, 8);
  } else if (f == kF32) {
    uint32_t x = 0x3f000000u | (digits & 0x1fffffu);
    memcpy(at, &x, 4);
  } else if (f == kBF16 || f == kF16) {
    uint16_t x = f == kBF16 ? uint16_t(0x3f00u | (digits & 0x1fu)) : uint16_t(0x3800u | (digits & 0xffu));
    memcpy(at, &x, 2);
  } else {  // codes and rests may have any bits
    memcpy(at, &digits, size_of(f));
  }
}

// `count` elements after `offset` others, in a block that ends with the last.
struct Block {
  std::unique_ptr<char[]> memory;
  size_t bytes, start;
  Block(Format f, int64_t count, int64_t offset, Random& r)
      : bytes(size_t(count + offset) * size_of(f)), start(size_t(offset) * size_of(f)) {
    memory.reset(new char[bytes]);
    for (size_t at = 0; at < bytes; at += size_of(f)) put(memory.get() + at, f, r);
  }
  char* data() { return memory.get() + start; }
};

Group group_of(const Rule& kernel, bool maximize) {
  Group g;
  g.maximize = maximize;
  g.l1 = maximize ? 0.01 : 0;
  g.ema_weight = 0.1;
  g.seed = 7;
  std::string name;
  for (const char* c = kernel.hyper;; ++c) {
    if (*c && *c != ' ') {
      name += *c;
      continue;
    }
    if (!name.empty()) {
      bool flag = name.find("nesterov") != std::string::npos || name.find("decoupled") != std::string::npos;
      g.hyper.push_back(name == "lr" ? 0.25 : name == "eps" ? 1e-8 : flag ? 1 : name == "weight_decay" ? 0.1 : 0.9);
    }
    name.clear();
    if (!*c) break;
  }
  return g;
}

// Rows of one kernel and one combination of formats: `lengths` dense ones, and some strided.
struct Problem {
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<float[]>> scales;
  std::vector<size_t> scale_bytes;
  std::vector<std::unique_ptr<Strided>> layouts;
  std::vector<Tensor> tensors;
  Step step;
  int operands;  // of a tensor: param, grad, states, what is kept beside the weight, its average
  bool ema;      // of every other combination

  Problem(int rule, int form, const std::vector<int64_t>& lengths, bool with_strided) {
    const Rule& k = rule_of(rule);
    ema = form % 2;
    operands = 2 + k.n_states + (form_of({rule, form}).master != kNoMaster) + ema;
    step.groups = {group_of(k, false), group_of(k, true)};
    Random r{uint64_t(rule * 100 + form)};
    for (int64_t n : lengths) dense(k, {rule, form}, n, r);
    if (with_strided) {
      strided(k, {rule, form}, {5, 7, 3}, r);
      strided(k, {rule, form}, {41, 37}, r);
      strided(k, {rule, form}, {1301}, r);
    }
  }

  Tensor& add(const Rule& k, KernelId id, int64_t n) {
    Tensor t = {};
    t.kernel = id, t.group = int(tensors.size() % 2), t.span.n = n;
    t.clock.carry = 1;
    for (size_t i = 0; i < tensors.size() % 3; ++i)
      k.advance(k.self, step.groups[size_t(t.group)].hyper.data(), t.clock);
    tensors.push_back(t);
    return tensors.back();
  }

  Format format(const Rule& k, KernelId id, int operand) const {
    const Form& f = form_of(id);
    if (operand < 2) return operand == 0 ? f.param : f.grad;
    if (operand < 2 + k.n_states) return f.state;
    return ema && operand == operands - 1 ? ema_format(f.param) : residual_format(f.master);
  }

  void set(const Rule& k, Tensor& t, int operand, char* data) const {
    if (operand == 0) {
      t.span.param = data;
    } else if (operand == 1) {
      t.span.grad = data;
    } else if (operand < 2 + k.n_states) {
      t.span.state[operand - 2] = data;
    } else {
      (ema && operand == operands - 1 ? t.span.ema : t.span.residual) = data;
    }
  }

  // Exactly as many scales as the tensor has blocks.
  void add_scales(const Rule& k, Tensor& tensor) {
    tensor.sequence = int64_t(tensors.size());
    if (form_of(tensor.kernel).state != kI8) return;
    for (int s = 0; s < k.n_states; ++s) {
      const size_t n = size_t(tensor.span.n + kBlock - 1) / kBlock;
      scales.emplace_back(new float[n]);
      scale_bytes.push_back(n * sizeof(float));
      std::fill_n(scales.back().get(), n, 0.75f);
      tensor.span.scale[s] = scales.back().get();
    }
  }

  void dense(const Rule& k, KernelId id, int64_t n, Random& r) {
    Tensor& tensor = add(k, id, n);
    for (int o = 0; o < operands; ++o) {
      blocks.emplace_back(format(k, id, o), n, int64_t(r.next() % 19), r);
      set(k, tensor, o, blocks.back().data());
    }
    add_scales(k, tensor);
  }

  // Every operand in a layout of its own: axes in another order, some reversed, with gaps.
  void strided(const Rule& k, KernelId id, const std::vector<int64_t>& shape, Random& r) {
    int64_t n = 1;
    for (int64_t s : shape) n *= s;
    Tensor& tensor = add(k, id, n);
    layouts.push_back(std::make_unique<Strided>());
    Strided& s = *layouts.back();
    tensor.strided = &s;
    s.n = operands, s.ndim = int(shape.size());
    for (int d = 0; d < s.ndim; ++d) s.shape[d] = shape[size_t(d)];
    for (int o = 0; o < operands; ++o) {
      int64_t step = 1 + o % 2, start = 0;
      for (int i = 0; i < s.ndim; ++i) {
        int d = (i + o) % s.ndim;
        s.stride[o][d] = r.next() % 2 ? step : -step;
        if (s.stride[o][d] < 0) start += step * (s.shape[d] - 1);
        step *= s.shape[d] + (o == 0);
      }
      int64_t span = 1;
      for (int d = 0; d < s.ndim; ++d) span += llabs(s.stride[o][d]) * (s.shape[d] - 1);
      blocks.emplace_back(format(k, id, o), span, 0, r);
      set(k, tensor, o, blocks.back().data() + start * int64_t(size_of(format(k, id, o))));
    }
    add_scales(k, tensor);
  }

  std::vector<std::string> bytes() const {
    std::vector<std::string> out;
    for (const Block& b : blocks) out.emplace_back(b.memory.get(), b.bytes);
    for (size_t s = 0; s < scales.size(); ++s)
      out.emplace_back(reinterpret_cast<const char*>(scales[s].get()), scale_bytes[s]);
    return out;
  }

  // The bytes after two steps, or those before.
  std::vector<std::string> run(double max_norm, int threads) {
    for (int i = 0; i < 2; ++i) {
      step.clear();
      for (const Tensor& t : tensors) step.add(t);
      Scaling scaling;
      scaling.max_norm = max_norm;
      double norm = step.run(scaling, Team::kOurs, threads);
      tensors = step.host();
      expect(max_norm > 0 ? isfinite(norm) : norm == -1, "norm");
    }
    return bytes();
  }
};

const std::vector<int64_t> kLengths = {0, 1, 2, 3, 5, 8, 13, 15, 16, 17, 31, 33, 64, 65, 127, 200, 4097, 0, 7};

void same_bytes_every_way(int rule, int form) {
  const std::string name = std::string(rule_of(rule).name) + " form " + std::to_string(form);
  auto lengths = kLengths;
  if (form == 1) lengths.push_back(70001);  // enough work for several threads
  for (double max_norm : {0.0, 0.5}) {
    use_isa("baseline");
    Problem first(rule, form, lengths, true);
    const Format param = form_of({rule, form}).param;
    const auto before = first.bytes(), want = first.run(max_norm, 1);
    for (size_t b = 0; b < first.blocks.size(); ++b) {
      const bool gradient = b % size_t(first.operands) == 1;
      if (gradient) expect(want[b] == before[b], name + ": a gradient was written");
      if (b % size_t(first.operands) == 0 && !want[b].empty() && first.tensors[b / size_t(first.operands)].span.n)
        expect(want[b] != before[b] || size_of(param) == 2, name + ": a parameter did not move");
    }
    for (int isa = 0; usable_isa(isa); ++isa)
      for (int threads : {1, 3, 8}) {
        use_isa(usable_isa(isa));
        Problem again(rule, form, lengths, true);
        expect(again.run(max_norm, threads) == want,
               name + " on " + usable_isa(isa) + ", " + std::to_string(threads) + " threads");
      }
  }
  use_isa(nullptr);
}

// A step made of a form's decoding, the rule on numbers, and the form's encoding has the bytes of the kernel.
template <class R>
void decoded_and_encoded(int rule, int form, const char* name) {
  const KernelId id{rule, form};
  if (!exists(id) || form_of(id).param == kF64) return;
  const HostKernel& kernel = host_kernel(id);
  const Rule& description = rule_of(rule);
  const Group group = group_of(description, false);
  for (int64_t n : {1, 63, 64, 200}) {
    Problem a(rule, form, {n}, false), b(rule, form, {n}, false);
    Span x = a.tensors[0].span, y = b.tensors[0].span;
    x.key = y.key = 12345;
    Clock clock = {};
    clock.carry = 1;
    description.advance(description.self, group.hyper.data(), clock);
    alignas(16) char constants[kPreparedBytes];
    kernel.prepare(kernel.self, group.hyper.data(), clock, 0.5, constants);
    kernel.update(kernel.self, constants, x);
    const auto ready = reinterpret_cast<const Prepared<R, float>*>(constants);
    std::vector<float> numbers(size_t(n) * (2 + kMaxStates));
    float *p = numbers.data(), *g = p + n;
    void* states[kMaxStates];
    for (int k = 0; k < kMaxStates; ++k) states[k] = g + n * (k + 1);
    host_form(id).decode(y, description.n_states, description.codes, p, g, states);
    for (int64_t i = 0; i < n; ++i) {
      float s[kMaxStates + 1];
      for (int k = 0; k < description.n_states; ++k) s[k] = static_cast<float*>(states[k])[i];
      apply<words(R::states)>(ready->rule, p[i], g[i] * ready->scale, s);
      for (int k = 0; k < description.n_states; ++k) static_cast<float*>(states[k])[i] = s[k];
    }
    host_form(id).encode(y, description.n_states, description.codes, p, states);
    expect(a.bytes() == b.bytes(), std::string(name) + " form " + std::to_string(form) + " decoded and encoded");
  }
}

void every_form_apart_from_its_rule() {
  for (int form = 0; form < library().n_forms; ++form) {
#define RULE(name, R) decoded_and_encoded<R<float>>(name##_number, form, #name);
    FUSEDOPT_RULES(RULE)
#undef RULE
  }
}

// A library that is added has rules behind the built-in ones, with the same results.
void added_libraries() {
  const int own = n_rules();
  const KernelLibrary* again = &library();
  const char* why = "";
  const int first = add_library(&again, 1, &why);
  expect(first == own && n_rules() == 2 * own, std::string("a library is added: ") + why);
  for (int rule : {0, own - 1}) {
    expect(strcmp(rule_of(first + rule).name, rule_of(rule).name) == 0, "an added rule");
    const auto want = Problem(rule, 1, {70001, 5}, true).run(0.5, 2);
    expect(Problem(rule, 1, {70001, 5}, true).run(0.5, 2) == want, "a built-in rule beside an added one");
    Problem added(rule, 1, {70001, 5}, true);
    for (Tensor& t : added.tensors) t.kernel.rule += first;
    expect(added.run(0.5, 2) == want, "a kernel of an added library");
  }
  KernelLibrary other = *again;
  other.size += 8;
  again = &other;
  expect(add_library(&again, 1, &why) < 0, "a library of another build is refused");
}

// Lion as a program, once with a pass that sums up the gradient first, has the bytes of the built-in rule.
void programs() {
  ProgramSource lion;
  lion.name = "lion as data";
  lion.hyper = "lr beta1 beta2 weight_decay";
  lion.states = "exp_avg";
  lion.codes = {kSigned};
  const int16_t one = 4 + kClockNumbers, w1 = one + 1, w2 = one + 2, decay = one + 3, keep = one + 4;
  lion.numbers = {{kLiteral, 0, 0, 0, 1},
                  {kSubtract, one, 1, 0, 0},
                  {kSubtract, one, 2, 0, 0},
                  {kMultiply, 0, 3, 0, 0},
                  {kSubtract, one, decay, 0, 0}};
  CodeSource update;
  update.constants = {-1, w1, w2, 0, keep};
  update.signs = {1, 1, 1, -1, 1};
  update.n_registers = 4;
  update.instructions = {{kLerps + 1, 3, {2, 1, 0, 0}, {0, 0, 1, 0, 0}},
                         {kUnary + kSign, 3, {3, 3, 3, 3}, {0, 0, 0, 0, 0}},
                         {kFmas + 2, 0, {3, 0, 0, 0}, {0, 3, 4, 0, 0}},
                         {kLerps + 1, 2, {2, 1, 0, 0}, {0, 0, 2, 0, 0}}};
  lion.variants = {update};
  CodeSource pass;
  pass.constants = {-1};
  pass.signs = {1};
  pass.n_registers = 3;
  pass.results = {1};
  ProgramSource with_pass = lion;
  with_pass.passes = {{true}};
  with_pass.variants = {pass, update};
  const std::vector<int64_t> lengths = {70001, 5, 0, 64, 4097};
  for (const ProgramSource& source : {lion, with_pass}) {
    const int rule = add_program(source);
    for (int form = 0; form < library().n_forms; ++form) {
      if (!exists({lion_number, form})) continue;
      expect(exists({rule, form}), "a program has the forms of its rule");
      const auto want = Problem(lion_number, form, lengths, true).run(0.5, 1);
      for (int threads : {1, 3}) {
        Problem same(lion_number, form, lengths, true);
        for (Tensor& t : same.tensors) t.kernel.rule = rule;
        expect(same.run(0.5, threads) == want, source.name + " in form " + std::to_string(form));
      }
    }
  }
  ProgramSource wrong = lion;
  wrong.variants[0].instructions[0].to = 1;  // the gradient
  try {
    add_program(wrong);
    expect(false, "a program that writes the gradient is refused");
  } catch (const std::invalid_argument&) {
  }
}

// Steps of several Python threads, as it were: plans of their own, one pool, the instruction set changing under them.
void several_threads_at_once() {
  const int kernels = library().n_rules;
  const std::vector<int64_t> lengths = {40001, 3, 0, 30011};
  std::vector<std::vector<std::string>> want;
  for (int k = 0; k < kernels; ++k) want.push_back(Problem(k, 1, lengths, true).run(0.5, 1));
  std::atomic<bool> done{false};
  std::thread chooser([&] {
    for (int i = 0; !done; ++i) use_isa(usable_isa(i) ? usable_isa(i) : (i = -1, nullptr));
  });
  std::vector<std::thread> steppers;
  for (int t = 0; t < 4; ++t)
    steppers.emplace_back([&, t] {
      for (int i = 0; i < 3; ++i)
        for (int k = 0; k < kernels; ++k) {
          int which = (k + t * 3) % kernels;
          expect(Problem(which, 1, lengths, true).run(0.5, 3) == want[size_t(which)], "several threads at once");
        }
    });
  for (auto& s : steppers) s.join();
  done = true;
  chooser.join();
  use_isa(nullptr);
}

// Tables that are updated by rows: lookups by int32 and int64, in any order, with gaps between rows and between values.
// Of rules that carry no number every other table counts steps by row; with SGD the tables have a sum for each row, and
// in the last one every row occurs.
struct Tables {
  static constexpr int64_t kRows[] = {1, 700, 5}, kWidths[] = {3, 64, 640}, kLookups[] = {4, 40000, 9};
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<float[]>> scales, of_rows;
  std::vector<int64_t> n_of_rows;
  std::vector<std::vector<int64_t>> wide;
  std::vector<std::vector<int32_t>> narrow;
  std::vector<Lookups> rows;
  std::vector<Tensor> tensors;
  Step step;

  Tables(int rule, int form) {
    const Rule& k = rule_of(rule);
    const Form& f = form_of({rule, form});
    const bool coded = f.state == kI8 && k.n_states > 0;
    step.groups = {group_of(k, false), group_of(k, true)};
    const bool sums = k.name == std::string("sgd");
    for (Group& g : step.groups)
      if (sums) g.hyper.insert(g.hyper.end(), {0.1, 1e-6});  // of row-wise Adagrad: lr_decay, eps
    Random r{uint64_t(rule * 100 + form + 1)};
    wide.resize(3), narrow.resize(3), rows.resize(3);
    for (size_t t = 0; t < 3; ++t) {
      if (coded && kWidths[t] % kBlock != 0) continue;
      const bool every = sums && t == 2;
      const int64_t n = every ? kRows[t] : kLookups[t], gap = coded ? 0 : 5;
      Lookups& l = rows[t];
      l = {nullptr, t != 1, 1, n, kRows[t], kWidths[t], {}, {}, {}, nullptr, {}};
      auto numbers = [&] {
        of_rows.emplace_back(new float[size_t(kRows[t])]);
        n_of_rows.push_back(kRows[t]);
        return std::fill_n(of_rows.back().get(), kRows[t], float(t)) - kRows[t];
      };
      if (t % 2 == 1 && !k.carries) l.steps = numbers();
      if (sums) l.sum = {numbers(), false, kHost};
      for (int64_t i = 0; i < n; ++i) {
        const auto row = int64_t(r.next() % (1 + r.next() % uint64_t(kRows[t])));
        wide[t].push_back(row), narrow[t].push_back(int32_t(row));
      }
      if (!every) l.indices = l.wide ? static_cast<const void*>(wide[t].data()) : narrow[t].data();
      Tensor tensor = {};
      tensor.kernel = {rule, form}, tensor.group = int(t % 2), tensor.rows = &l, tensor.clock.carry = 1;
      tensor.span.n = kRows[t] * kWidths[t], tensor.sequence = int64_t(t);
      const bool ema = form % 2;
      const int operands = 2 + k.n_states + (f.master != kNoMaster) + ema;
      for (int o = 0; o < operands; ++o) {
        const Format format = o == 0                     ? f.param
                              : o == 1                   ? f.grad
                              : o < 2 + k.n_states       ? f.state
                              : ema && o == operands - 1 ? ema_format(f.param)
                                                         : residual_format(f.master);
        const int64_t count = o == 1 ? n : kRows[t];
        l.stride[o] = kWidths[t] + (o < 2 + k.n_states && o >= 2 ? gap : 2 * gap);
        blocks.emplace_back(format, (count - 1) * l.stride[o] + kWidths[t], int64_t(r.next() % 7), r);
        void* data = blocks.back().data();
        if (o == 0) {
          tensor.span.param = data;
        } else if (o == 1) {
          tensor.span.grad = data;
        } else if (o < 2 + k.n_states) {
          tensor.span.state[o - 2] = data;
        } else {
          (ema && o == operands - 1 ? tensor.span.ema : tensor.span.residual) = data;
        }
      }
      for (int s = 0; coded && s < k.n_states; ++s) {
        scales.emplace_back(new float[size_t(tensor.span.n / kBlock)]);
        std::fill_n(scales.back().get(), tensor.span.n / kBlock, 0.75f);
        tensor.span.scale[s] = scales.back().get();
      }
      tensors.push_back(tensor);
    }
  }

  std::vector<std::string> run(double max_norm, int threads) {
    for (int i = 0; i < 2; ++i) {
      step.clear();
      for (Tensor& t : tensors) {
        t.clock.t = i;
        step.add(t);
      }
      Scaling scaling;
      scaling.max_norm = max_norm;
      expect((step.run(scaling, Team::kOurs, threads) >= 0) == (max_norm > 0), "norm of rows");
    }
    std::vector<std::string> out;
    for (const Block& b : blocks) out.emplace_back(b.memory.get(), b.bytes);
    for (size_t i = 0; i < of_rows.size(); ++i)
      out.emplace_back(reinterpret_cast<const char*>(of_rows[i].get()), size_t(n_of_rows[i]) * sizeof(float));
    return out;
  }
};

void rows_every_way(int rule, int form) {
  for (double max_norm : {0.0, 0.5}) {
    use_isa("baseline");
    const auto before = Tables(rule, form).run(max_norm, 1);
    for (int isa = 0; usable_isa(isa); ++isa)
      for (int threads : {2, 8}) {
        use_isa(usable_isa(isa));
        expect(Tables(rule, form).run(max_norm, threads) == before,
               std::string("rows, ") + rule_of(rule).name + " form " + std::to_string(form));
      }
  }
  use_isa(nullptr);
  Tables bad(rule, form);
  if (!bad.rows.back().indices) return;
  bad.wide.back()[5] = bad.rows.back().rows;
  bad.step.clear();
  for (Tensor& t : bad.tensors) bad.step.add(t);
  try {
    bad.step.run(Scaling{}, Team::kOurs, 2);
    expect(false, "an index that is no row");
  } catch (const BadIndex& e) {
    expect(e.position == 5 && e.index == 5, "the index that is no row");
  }
}

void many_small_tensors() {
  const std::vector<int64_t> lengths(1000, 64);
  for (int kernel = 0; kernel < library().n_rules; ++kernel) {
    const auto want = Problem(kernel, 1, lengths, false).run(0, 1);
    for (int threads : {2, 5}) expect(Problem(kernel, 1, lengths, false).run(0, threads) == want, "many small tensors");
  }
}

void every_part_once() {
  for (int parts : {1, 2, 7, kMaxParts}) {
    std::vector<std::atomic<int>> seen(static_cast<size_t>(parts));
    for (int round = 0; round < 20; ++round)
      parallel(
          Team::kOurs, std::min(parts, 4), parts,
          [](void* s, int part) { ++(*static_cast<decltype(seen)*>(s))[size_t(part)]; }, &seen);
    for (auto& s : seen) expect(s == 20, "every part runs once");
  }
}

// Every loss and layer over one shape: all that they write, and the sums that they return.
std::vector<char> losses_and_layers(Format f, int64_t rows, int64_t columns, int threads) {
  Random r{7};
  const int64_t n = rows * columns;
  Block x(f, n, 0, r), y(f, n, 0, r), value(f, n, 0, r), out(f, n, 0, r), kept(f, n, 0, r), rest(f, n, 0, r);
  Block weight(f, rows, 0, r), a(f, columns, 0, r), b(f, columns, 0, r), c(f, columns, 0, r), d(f, columns, 0, r);
  std::vector<int64_t> labels(static_cast<size_t>(rows));
  for (auto& label : labels) label = int64_t(r.next()) % columns;
  std::vector<double> sums(static_cast<size_t>(2 * columns)), numbers;
  std::vector<char> result;
  auto at = [](Block& block) { return static_cast<void*>(block.memory.get()); };
  auto note = [&](Block& block) { result.insert(result.end(), block.memory.get(), block.memory.get() + block.bytes); };
  const NetworkTable& t = network_table();
  for (int loss = 0; loss < t.n_losses; ++loss) {
    numbers.push_back(
        run_loss(loss, f, {at(x), at(y), at(weight), at(value), at(out), 0, n, columns, 0.3, 2}, threads));
    numbers.push_back(run_loss(loss, f, {at(x), at(y), nullptr, nullptr, at(out), 0, n, 1, 0.3, 2}, threads));
    note(out), note(value);
  }
  for (double smoothing : {0.0, 0.1}) {
    SoftmaxSpan s{at(x), labels.data(), nullptr, at(a), at(weight), at(value), at(out), rows, columns, smoothing, 2};
    numbers.push_back(run_softmax(f, s, threads));
    s.labels = nullptr;
    s.targets = at(y);
    numbers.push_back(run_softmax(f, s, threads));
    note(out);
  }
  numbers.push_back(run_penalty(f, {at(x), at(out), n, 0.1, 0.2, 3}, threads));
  numbers.push_back(double(count_unfit(f, at(x), n, kPlusMinusOne, threads)));
  run_dropout(f, at(x), at(rest), n, {1, 2, 1u << 31, 2}, threads);
  note(out), note(rest);
  LayerSpan s{at(x), at(y), at(out), at(kept), sums.data(), at(a), at(b), at(c), at(d), rows, columns};
  for (int activation = 0; activation < kActivations; ++activation) {
    run_layer(t.forward[activation][f], f, s, 0, threads);
    run_layer(t.backward[activation][f], f, s, 1, threads);
    note(out);
    numbers.insert(numbers.end(), sums.begin(), sums.begin() + columns);
  }
  for (auto loop : {t.column_sums[f], t.column_squares[f]}) {
    run_layer(loop, f, s, 1, threads);
    numbers.insert(numbers.end(), sums.begin(), sums.begin() + columns);
  }
  run_layer(t.normalize[f], f, s, 0, threads);
  run_layer(t.normal_sums[f], f, s, 2, threads);
  numbers.insert(numbers.end(), sums.begin(), sums.end());
  run_layer(t.normal_back[f], f, s, 0, threads);
  note(out), note(kept);
  auto* bytes = reinterpret_cast<const char*>(numbers.data());
  result.insert(result.end(), bytes, bytes + numbers.size() * sizeof(double));
  return result;
}

// Two epochs of a linear model: its parameters, their average and the results.
std::vector<char> linear_epochs(Format f, int64_t rows, int64_t features, int64_t outputs, int64_t batch) {
  Random r{11};
  const int64_t n = (features + 1) * outputs;
  Block x(f, rows * features, 0, r), y(f, rows * outputs, 0, r), weight(f, rows, 0, r);
  Block params(f, n, 0, r), grads(f, n, 0, r), mean(f, n, 0, r), velocity(f, n, 0, r);
  int rule = 0;
  while (rule_of(rule).n_states != 1 || find_kernel(rule, {f, f, f, kNoMaster, false, false}).form < 0) ++rule;
  Tensor tensor{};
  tensor.kernel = find_kernel(rule, {f, f, f, kNoMaster, false, false});
  tensor.span.param = params.data();
  tensor.span.grad = grads.data();
  tensor.span.state[0] = velocity.data();
  tensor.span.n = n;
  Step step;
  step.groups = {group_of(rule_of(rule), false)};
  step.add(tensor);
  std::vector<int64_t> order(static_cast<size_t>(rows));
  for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(order.size() - 1 - i);
  const std::vector<double> rates(order.size(), 0.01), follow(order.size(), 0.5);
  LinearEpoch epoch{};
  epoch.x = x.data(), epoch.y = y.data(), epoch.params = params.data(), epoch.grads = grads.data();
  epoch.n = rows, epoch.features = features, epoch.outputs = outputs, epoch.batch = batch;
  epoch.intercepts = true;
  epoch.divisor = 2, epoch.l1 = 0.1, epoch.l2 = 0.01, epoch.proximal = 10;
  epoch.rates = rates.data(), epoch.follow = follow.data();
  std::vector<char> result;
  std::vector<int32_t> columns, begins{0};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = features - 1; c >= 0; --c) columns.push_back(int32_t(c));
    begins.push_back(int32_t(columns.size()));
  }
  for (bool second : {false, true}) {
    if (second) epoch.columns = columns.data(), epoch.begins = begins.data();
    if (second) epoch.order = order.data(), epoch.weight = weight.data(), epoch.mean = mean.data(), epoch.max_norm = 1;
    const EpochResult got = run_linear_epoch(f, epoch, step);
    for (double number : {got.loss, got.weight, got.last_loss, got.norm, double(got.steps)}) {
      auto* bytes = reinterpret_cast<const char*>(&number);
      result.insert(result.end(), bytes, bytes + sizeof(number));
    }
    for (Block* block : {&params, &mean}) result.insert(result.end(), block->data(), block->data() + block->bytes);
  }
  return result;
}

void linear_epochs_every_way() {
  const int64_t shapes[][4] = {{1, 1, 1, 1}, {50, 7, 3, 16}, {50, 8, 1, 50}, {33, 17, 4, 7}, {5, 0, 2, 2}};
  for (Format f : {kF64, kF32})
    for (auto [rows, features, outputs, batch] : shapes) {
      use_isa("baseline");
      const auto want = linear_epochs(f, rows, features, outputs, batch);
      for (int i = 0; const char* isa = usable_isa(i); ++i) {
        use_isa(isa);
        expect(linear_epochs(f, rows, features, outputs, batch) == want, std::string("linear epochs, ") + isa);
      }
    }
}

const std::pair<int64_t, int64_t> kShapes[] = {{1, 1}, {3, 10}, {700, 3}, {33, 70}, {5, 1000}, {300, 260}};

void losses_and_layers_every_way() {
  for (Format f : {kF64, kF32})
    for (auto [rows, columns] : kShapes) {
      use_isa("baseline");
      const auto want = losses_and_layers(f, rows, columns, 1);
      for (int i = 0; const char* isa = usable_isa(i); ++i)
        for (int threads : {1, 2, 5}) {
          use_isa(isa);
          expect(losses_and_layers(f, rows, columns, threads) == want, std::string("losses and layers, ") + isa);
        }
    }
  use_isa(nullptr);
}

// FNV-1a.
struct Hash {
  uint64_t x = 0xcbf29ce484222325u;
  void add(const char* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) x = (x ^ uint8_t(data[i])) * 0x100000001b3u;
  }
};

int digest() {
  for (int rule = 0; rule < library().n_rules; ++rule)
    for (int form = 0; form < library().n_forms; ++form) {
      if (!exists({rule, form})) continue;
      Hash hash;
      for (double max_norm : {0.0, 0.5})
        for (const auto& bytes : Problem(rule, form, kLengths, true).run(max_norm, 2))
          hash.add(bytes.data(), bytes.size());
      printf("%s %d %016llx\n", rule_of(rule).name, form, static_cast<unsigned long long>(hash.x));
    }
  for (Format f : {kF64, kF32}) {
    Hash hash;
    for (auto [rows, columns] : kShapes) {
      const auto bytes = losses_and_layers(f, rows, columns, 2);
      hash.add(bytes.data(), bytes.size());
    }
    printf("losses and layers %d %016llx\n", int(f), static_cast<unsigned long long>(hash.x));
  }
  return failures ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && strcmp(argv[1], "--digest") == 0) return digest();
  Step nothing;
  expect(nothing.run(Scaling{}, Team::kOurs, 4) == -1, "an empty step");
  every_part_once();
  const int rules = library().n_rules;
  for (int rule = 0; rule < rules; ++rule)
    for (int form = 0; form < library().n_forms; ++form)
      if (exists({rule, form})) same_bytes_every_way(rule, form);
  for (int form = 0; form < library().n_forms; ++form)
    for (int rule : {0, 1, 7, 9})  // without state, with one and two, and with a carried number
      if (exists({rule, form})) rows_every_way(rule, form);
  every_form_apart_from_its_rule();
  many_small_tensors();
  losses_and_layers_every_way();
  linear_epochs_every_way();
  several_threads_at_once();
  added_libraries();
  programs();
  printf("%d rules, %d failures\n", rules, failures.load());
  return failures ? 1 : 0;
}
