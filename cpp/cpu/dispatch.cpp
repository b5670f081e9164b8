// See dispatch.h.
#include "cpu/dispatch.h"

#include <string.h>

#include <atomic>
#include <mutex>

#ifdef FUSEDOPT_X86
#ifdef _MSC_VER
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace fusedopt {

const KernelLibrary* library_baseline();
const KernelLibrary* library_avx2();
const KernelLibrary* library_avx512();

namespace {

enum Level { kBaseline, kAvx2, kAvx512, kLevels };
const char* const names[kLevels] = {"baseline", "avx2", "avx512"};

#ifdef FUSEDOPT_X86
#ifdef _MSC_VER
void cpuid(int leaf, int r[4]) { __cpuidex(r, leaf, 0); }
unsigned long long enabled_states() { return _xgetbv(0); }
#else
void cpuid(int leaf, int r[4]) { __cpuid_count(leaf, 0, r[0], r[1], r[2], r[3]); }
unsigned long long enabled_states() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long long>(high) << 32 | low;
}
#endif

// Asks the processor itself: __builtin_cpu_supports asks the runtime library of the compiler, and Zig's knows nothing.
Level processor() {
  int r[4];
  cpuid(0, r);
  if (r[0] < 7) return kBaseline;
  cpuid(1, r);
  bool fma = r[2] >> 12 & 1, osxsave = r[2] >> 27 & 1;
  if (!fma || !osxsave) return kBaseline;
  unsigned long long states = enabled_states();
  cpuid(7, r);
  if (!(r[1] >> 5 & 1) || (states & 6) != 6) return kBaseline;
  bool f = r[1] >> 16 & 1, dq = r[1] >> 17 & 1, bw = r[1] >> 30 & 1, vl = r[1] >> 31 & 1;
  return f && dq && bw && vl && (states & 0xe6) == 0xe6 ? kAvx512 : kAvx2;
}
#else
Level processor() { return kBaseline; }
#endif

// A library in its builds for each instruction set, and the number of its first rule.
struct Entry {
  const KernelLibrary* by_level[kLevels] = {};
  int first_rule = 0;
};

constexpr int kMaxLibraries = 16384;

struct Catalogue {
  const Level best = processor();
  Entry entries[kMaxLibraries];
  std::atomic<int> n{1};
  std::mutex adding;
  Catalogue() {
    Entry& own = entries[0];
    for (const KernelLibrary*& l : own.by_level) l = library_baseline();
#if defined(FUSEDOPT_X86)
    own.by_level[kAvx2] = library_avx2();
    own.by_level[kAvx512] = library_avx512();
#endif
  }
};

Catalogue& catalogue() {
  static Catalogue* const c = new Catalogue;
  return *c;
}

std::atomic<int> chosen{-1};

// The number of a form in which a rule of the library has a kernel, or -1.
int find_form(const KernelLibrary& l, int rule, const Form& form) {
  for (int f = 0; f < l.n_forms; ++f) {
    Form wanted = form;
    if (l.rules[rule].n_states == 0) {
      wanted.state = l.forms[f].state;
      wanted.noisy_state = l.forms[f].noisy_state;
    }
    if (l.forms[f] == wanted && l.host->kernels[rule][f].update) return f;
  }
  return -1;
}

}  // namespace

int isa_in_use() {
  const int level = chosen.load(std::memory_order_relaxed);
  return level >= 0 ? level : int(catalogue().best);
}

const char* usable_isa(int i) { return i >= 0 && i <= int(catalogue().best) ? names[i] : nullptr; }

bool use_isa(const char* name) {
  for (int i = 0; name && usable_isa(i); ++i)
    if (strcmp(names[i], name) == 0) {
      chosen = i;
      return true;
    }
  if (!name) chosen = -1;
  return !name;
}

const KernelLibrary& library() { return own_library(isa_in_use()); }
const KernelLibrary& own_library(int isa) { return *catalogue().entries[0].by_level[isa]; }

const KernelLibrary& library_of(int rule, int* number) {
  const Catalogue& c = catalogue();
  int e = 0;
  if (rule >= c.entries[0].by_level[0]->n_rules) {  // the last entry whose first rule is not beyond it
    int beyond = c.n.load(std::memory_order_acquire);
    while (beyond - e > 1) {
      const int middle = e + (beyond - e) / 2;
      (c.entries[middle].first_rule > rule ? beyond : e) = middle;
    }
  }
  *number = rule - c.entries[e].first_rule;
  return *c.entries[e].by_level[isa_in_use()];
}

int n_rules() {
  const Catalogue& c = catalogue();
  const Entry& last = c.entries[c.n.load(std::memory_order_acquire) - 1];
  return last.first_rule + last.by_level[0]->n_rules;
}

const Rule& rule_of(int rule) {
  int r;
  return library_of(rule, &r).rules[r];
}
const Form& form_of(KernelId id) {
  int r;
  return library_of(id.rule, &r).forms[id.form];
}
Format grad_format(KernelId id) { return id.wide_grad ? kF32 : form_of(id).grad; }
const HostKernel& host_kernel(KernelId id) {
  int r;
  const KernelLibrary& l = library_of(id.rule, &r);
  const int form = id.wide_grad ? find_form(l, r, {kF32, kF32, kF32, kNoMaster, false, false}) : id.form;
  return l.host->kernels[r][form];
}
const HostForm& host_form(KernelId id) {
  int r;
  return library_of(id.rule, &r).host->forms[id.form];
}
bool exists(KernelId id) { return host_kernel(id).update != nullptr; }

KernelId find_kernel(int rule, const Form& form) {
  int r;
  const KernelLibrary& l = library_of(rule, &r);
  const int exact = find_form(l, r, form);
  if (exact >= 0 || form.grad != kF32 || (form.param != kBF16 && form.param != kF16)) return {rule, exact};
  Form narrow = form;
  narrow.grad = form.param;
  return {rule, find_form(l, r, narrow), true};
}

int add_library(const KernelLibrary* const* by_isa, int n, const char** why) {
  Catalogue& c = catalogue();
  std::lock_guard<std::mutex> lock(c.adding);
  const int at = c.n.load();
  if (at == kMaxLibraries || n < 1 || !by_isa[0]) {
    *why = n < 1 || !by_isa[0] ? "a library for the baseline is missing" : "there are too many libraries";
    return -1;
  }
  Entry entry;
  for (int level = 0; level < kLevels; ++level) {
    const KernelLibrary* l = level < n && by_isa[level] ? by_isa[level] : entry.by_level[level - 1];
    if (strcmp(l->version, FUSEDOPT_VERSION) != 0 || l->size != kHostSize || !l->host) {
      *why = "it belongs to another build of fusedopt";
      return -1;
    }
    if (l->n_rules != by_isa[0]->n_rules || l->n_forms != by_isa[0]->n_forms) {
      *why = "its builds for the instruction sets differ in rules or forms";
      return -1;
    }
    entry.by_level[level] = l;
  }
  entry.first_rule = n_rules();
  c.entries[at] = entry;
  c.n.store(at + 1, std::memory_order_release);
  return entry.first_rule;
}

}  // namespace fusedopt
