// See programs.h.
#include "cpu/programs.h"

#include <stdexcept>

#include "cpu/dispatch.h"
#include "rules/element.h"
#include "rules/formats.h"

namespace fusedopt {

const Interpreter& interpreter_baseline();
const Interpreter& interpreter_avx2();
const Interpreter& interpreter_avx512();

namespace {

// A registered program with everything that it points to. Never freed.
struct Registered {
  ProgramSource source;
  std::vector<Variant> variants;
  Program program;
  Rule rule;
  struct Build {
    KernelLibrary library;
    HostTable host;
    Rule rule;
    Reduction wide, narrow;
    std::vector<ProgramKernel> programs;
    std::vector<HostKernel> kernels;
    const HostKernel* of_rule;
  } builds[3];
};

void expect(bool good, const char* what) {
  if (!good) throw std::invalid_argument(std::string("a program is out of range: ") + what);
}

void check_numbers(const std::vector<Number>& numbers, int given) {
  expect(given + int(numbers.size()) <= kMaxNumbers, "too many numbers");
  for (size_t i = 0; i < numbers.size(); ++i) {
    expect(numbers[i].op >= 0 && numbers[i].op < kNumberOps, "an operation");
    for (int a : {numbers[i].a, numbers[i].b, numbers[i].c}) expect(a >= 0 && a < given + int(i), "an argument");
  }
}

void check(const ProgramSource& s, int n_hyper, int n_states) {
  expect(n_hyper > 0 && n_states <= kMaxStates && int(s.codes.size()) == n_states, "states or hyperparameters");
  size_t n_sums = 0;
  for (const auto& pass : s.passes) n_sums += pass.size();
  expect(n_sums <= size_t(kMaxSums) && s.passes.size() <= n_sums, "sums");
  const size_t n_codes = size_t(1) << s.conditions.size();
  const int given = n_hyper + kClockNumbers, all = given + int(s.numbers.size());
  check_numbers(s.numbers, given);
  check_numbers(s.carry, given);
  expect(s.conditions.size() <= size_t(kMaxConditions), "conditions");
  expect(s.variants.size() == n_codes * (s.passes.size() + 1), "variants");
  for (int c : s.conditions) expect(c >= 0 && c < all, "a condition");
  for (size_t c = 0; c < s.variants.size(); ++c) {
    const CodeSource& v = s.variants[c];
    const size_t pass = c / n_codes;
    expect(v.results.size() == (pass < s.passes.size() ? s.passes[pass].size() : 0), "results");
    for (int r : v.results) expect(r >= 0 && r < v.n_registers, "a result of a pass");
    expect(v.n_registers >= 2 + n_states && v.n_registers <= kMaxRegisters, "registers");
    expect(v.instructions.size() <= size_t(kMaxInstructions), "too many instructions");
    expect(!v.constants.empty() && v.constants.size() <= size_t(kMaxConstants), "constants");
    expect(v.signs.size() == v.constants.size(), "signs");
    for (size_t k = 1; k < v.constants.size(); ++k) expect(v.constants[k] >= 0 && v.constants[k] < all, "a constant");
    for (const Instruction& i : v.instructions) {
      expect(i.code >= 0 && i.code < kCodes, "an instruction");
      const bool reads_only = pass < s.passes.size();  // a pass writes no operand, and nothing writes the gradient
      expect(i.to >= (reads_only ? 2 + n_states : 0) && i.to < v.n_registers && i.to != 1, "a result");
      for (int r : i.from) expect(r >= 0 && r < v.n_registers, "an operand");
      for (int k : i.constant) expect(k >= 0 && k < int(v.constants.size()), "an operand's constant");
    }
  }
}

// The operands that a variant reads, of the first `n` registers: those of its instructions, the results of a pass, and
// what the update leaves as it is, because it is encoded, too.
unsigned needed(const CodeSource& v, int n, bool updates) {
  unsigned read = 0, written = 0;
  for (const Instruction& i : v.instructions) {
    for (int o = 0; o < 4; ++o)
      if (vectors_of(i.code) >> o & 1 && i.from[o] < n) read |= 1u << i.from[o];
    if (i.to < n) written |= 1u << i.to;
  }
  for (int r : v.results)
    if (r < n) read |= 1u << r;
  return updates ? read | (~written & ((1u << n) - 1) & ~2u) : read;
}

// Whether a rule with these states has this form; the same condition as Update::exists.
bool has_form(const Rule& rule, const Form& form) {
  if (rule.n_states == 0) return !form.noisy_state;
  return form.state != kI8 || quantisable(rule.codes, rule.n_states);
}

ProgramKernel kernel_of(const Program& program, const Rule& rule, const Form& form, const HostForm& codec) {
  auto size = [](Format f) { return int(size_of(f)); };
  ProgramKernel k{&program,
                  codec,
                  {},
                  false,
                  size(form.param),
                  size(form.grad),
                  size(form.state),
                  size(residual_format(form.master))};
  for (int s = 0; s < kMaxStates; ++s) k.codes[s] = rule.codes[s];
  const bool numbers = form.param == kF64 || form.param == kF32;
  k.direct = numbers && form.grad == form.param && (form.state == form.param || rule.n_states == 0);
  return k;
}

void fill(Registered::Build& build, const Registered& all, const Interpreter& interpreter, const KernelLibrary& base) {
  build.rule = all.rule;
  build.rule.advance = interpreter.advance;
  build.wide = interpreter.wide_reduction;
  build.narrow = interpreter.narrow_reduction;
  for (Reduction* r : {&build.wide, &build.narrow}) {
    r->n_passes = all.program.n_passes;
    for (int p = 0; p < kMaxSums; ++p) r->n_sums[p] = all.program.n_sums[p];
  }
  for (int f = 0; f < base.n_forms; ++f)
    build.programs.push_back(kernel_of(all.program, all.rule, base.forms[f], base.host->forms[f]));
  for (int f = 0; f < base.n_forms; ++f) {
    HostKernel kernel = base.forms[f].param == kF64 ? interpreter.wide : interpreter.narrow;
    kernel.self = &build.programs[size_t(f)];
    if (!all.source.passes.empty()) kernel.reduction = base.forms[f].param == kF64 ? &build.wide : &build.narrow;
    if (!has_form(all.rule, base.forms[f])) kernel.update = nullptr;
    build.kernels.push_back(kernel);
  }
  build.of_rule = build.kernels.data();
  build.host = *base.host;
  build.host.kernels = &build.of_rule;
  build.library = base;
  build.library.rules = &build.rule;
  build.library.n_rules = 1;
  build.library.host = &build.host;
}

}  // namespace

int add_program(ProgramSource source) {
  const int n_hyper = words(source.hyper.c_str()), n_states = words(source.states.c_str());
  check(source, n_hyper, n_states);
  auto* const all = new Registered;  // never freed: the catalogue keeps pointers to it
  all->source = std::move(source);
  const ProgramSource& s = all->source;
  const size_t n_reading = s.passes.size() << s.conditions.size();  // variants of the passes
  for (const CodeSource& v : s.variants) {
    Variant to{v.instructions.data(),
               int(v.instructions.size()),
               v.n_registers,
               v.constants.data(),
               v.signs.data(),
               int(v.constants.size()),
               {},
               needed(v, 2 + n_states, all->variants.size() >= n_reading)};
    for (size_t k = 0; k < v.results.size(); ++k) to.results[k] = v.results[k];
    all->variants.push_back(to);
  }
  Program& p = all->program;
  p = {};
  p.n_hyper = n_hyper;
  p.n_states = n_states;
  p.numbers = s.numbers.data();
  p.n_numbers = int(s.numbers.size());
  p.conditions = s.conditions.data();
  p.n_conditions = int(s.conditions.size());
  p.n_passes = int(s.passes.size());
  int sum = 0;
  for (size_t pass = 0; pass < s.passes.size(); ++pass) {
    p.n_sums[pass] = int(s.passes[pass].size());
    for (bool square : s.passes[pass]) p.squares[sum++] = square;
  }
  p.variants = all->variants.data();
  p.carry = s.carry.data();
  p.n_carry = int(s.carry.size());
  all->rule = {s.name.c_str(), s.hyper.c_str(),  s.states.c_str(), {},
               n_states,       !s.carry.empty(), &all->program,    nullptr};
  for (int k = 0; k < kMaxStates; ++k) all->rule.codes[k] = k < n_states ? s.codes[size_t(k)] : kNotQuantised;
  const KernelLibrary* by_isa[3] = {};
  using Get = const Interpreter& (*)();
#if defined(FUSEDOPT_X86)
  const Get interpreters[] = {interpreter_baseline, interpreter_avx2, interpreter_avx512};
#else
  const Get interpreters[] = {interpreter_baseline};
#endif
  int n = 0;
  for (Get interpreter : interpreters) {
    fill(all->builds[n], *all, interpreter(), own_library(n));
    by_isa[n] = &all->builds[n].library;
    ++n;
  }
  const char* why = "";
  const int rule = add_library(by_isa, n, &why);
  if (rule < 0) {
    delete all;
    throw std::invalid_argument(why);
  }
  return rule;
}

}  // namespace fusedopt
