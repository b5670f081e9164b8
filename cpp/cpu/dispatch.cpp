// See dispatch.h.
#include "cpu/dispatch.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>

#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace fusedopt {
namespace {

enum Level { kBaseline, kAvx2, kAvx512 };

#if defined(FUSEDOPT_X86) && defined(_MSC_VER)
Level processor() {
  int r[4];
  __cpuid(r, 0);
  if (r[0] < 7) return kBaseline;
  __cpuidex(r, 1, 0);
  bool fma = r[2] >> 12 & 1, osxsave = r[2] >> 27 & 1;
  if (!fma || !osxsave) return kBaseline;
  unsigned long long state = _xgetbv(0);
  __cpuidex(r, 7, 0);
  if (!(r[1] >> 5 & 1) || (state & 6) != 6) return kBaseline;
  bool f = r[1] >> 16 & 1, dq = r[1] >> 17 & 1, bw = r[1] >> 30 & 1, vl = r[1] >> 31 & 1;
  return f && dq && bw && vl && (state & 0xe6) == 0xe6 ? kAvx512 : kAvx2;
}
#elif defined(FUSEDOPT_X86)
Level processor() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kBaseline;
  bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return wide ? kAvx512 : kAvx2;
}
#else
Level processor() { return kBaseline; }
#endif

struct Usable {
  const Table* tables[4] = {};
  int n = 0;
  Usable() {
    Level level = processor();
    (void)level;
    tables[n++] = table_baseline();
#if defined(FUSEDOPT_X86)
    if (level >= kAvx2) tables[n++] = table_avx2();
    if (level >= kAvx512) tables[n++] = table_avx512();
#endif
  }
};

const Usable& usable() {
  static const Usable u;
  return u;
}

std::atomic<const Table*> chosen{nullptr};

}  // namespace

const Table* usable_table(int i) { return i >= 0 && i < usable().n ? usable().tables[i] : nullptr; }

bool use_isa(const char* name) {
  const Usable& u = usable();
  if (!name) {
    chosen.store(u.tables[u.n - 1]);
    return true;
  }
  for (int i = 0; i < u.n; ++i)
    if (strcmp(u.tables[i]->isa, name) == 0) {
      chosen.store(u.tables[i]);
      return true;
    }
  return false;
}

const Table& table() {
  const Table* t = chosen.load(std::memory_order_relaxed);
  if (t) return *t;
  use_isa(nullptr);
  return *chosen.load();
}

}  // namespace fusedopt
