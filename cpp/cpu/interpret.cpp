// Runs programs (program.h) over tiles that stay in the L1 cache. Compiled once for each instruction set, which
// FUSEDOPT_ISA names. Every instruction is one loop that the compiler vectorises. No operation is contracted or
// reordered, so the results have the bits of the same rule compiled.
#include "cpu/program.h"
#include "rules/element.h"

#ifndef FUSEDOPT_ISA
#error "FUSEDOPT_ISA: baseline, avx2 or avx512"
#endif

namespace fusedopt {
namespace {

constexpr int64_t kCache = 24576;      // bytes for the registers of a tile
constexpr int64_t kLongestTile = 256;  // elements
constexpr int64_t kLine = 64;          // bytes of a cache line

// The smaller of two; NaN if either is NaN.
template <class T>
FUSEDOPT_HD T minimum(T a, T b) {
  return (a < b || a != a) ? a : b;
}

// The bits of a floating-point number.
template <class T>
struct Layout;
template <>
struct Layout<float> {
  using Word = uint32_t;
  static constexpr int digits = 23;
  static constexpr float low = -104, high = 89, one_over_log2 = 0x1.715476p0f, log2 = 0.693359375f,
                         log2_rest = -2.12194440e-4f, whole = 0x1.8p23f, tiny = 0x1p-126f, up = 0x1p24f, ups = 24;
  static constexpr int exp_terms = 8, log_terms = 7;
};
template <>
struct Layout<double> {
  using Word = uint64_t;
  static constexpr int digits = 52;
  static constexpr double low = -746, high = 710, one_over_log2 = 0x1.71547652b82fep0, log2 = 6.93145751953125e-1,
                          log2_rest = 1.42860682030941723212e-6, whole = 0x1.8p52, tiny = 0x1p-1022, up = 0x1p53,
                          ups = 53;
  static constexpr int exp_terms = 15, log_terms = 12;
};

// 2^n for an integer n within the range of the exponent.
template <class T>
FUSEDOPT_HD T power_of_two(T n) {
  using L = Layout<T>;
  constexpr T bias = T((1 << (sizeof(T) * 8 - L::digits - 2)) - 1);
  return bits<T>(typename L::Word(bits<typename L::Word>((n + bias) + L::whole) << L::digits));
}

// e^x by basic operations alone, with the same bits on every processor. The argument is reduced by a power of two.
template <class T>
FUSEDOPT_HD T exponential_of(T x) {
  using L = Layout<T>;
  const T y = x < L::low ? L::low : x > L::high ? L::high : x;
  const T n = (y * L::one_over_log2 + L::whole) - L::whole;
  const T r = (y - n * L::log2) - n * L::log2_rest;
  T sum = T(1) / T(L::exp_terms);
  for (int k = L::exp_terms - 1; k > 0; --k) sum = (T(1) + r * sum) * (T(1) / T(k));
  sum = T(1) + r * sum;
  const T half = (n * T(0.5) + L::whole) - L::whole;
  return x != x ? x : sum * power_of_two(half) * power_of_two(n - half);
}

// The natural logarithm likewise, by the series of artanh on [1/sqrt(2), sqrt(2)].
template <class T>
FUSEDOPT_HD T logarithm_of(T x) {
  using L = Layout<T>;
  using Word = typename L::Word;
  const T y = x < L::tiny ? x * L::up : x;
  const Word w = bits<Word>(y);
  constexpr Word mantissa = (Word(1) << L::digits) - 1;
  constexpr T one = 1, bias = T((1 << (sizeof(T) * 8 - L::digits - 2)) - 1);
  const T power_of_2 = T(Word(1) << L::digits);
  const T exponent = bits<T>(Word((w >> L::digits) | bits<Word>(power_of_2))) - power_of_2;
  const T m1 = bits<T>(Word((w & mantissa) | bits<Word>(one)));
  const bool large = m1 > T(1.41421356237309504880);
  const T m = large ? m1 * T(0.5) : m1;
  const T e = (exponent - bias) + (large ? T(1) : T(0)) - (x < L::tiny ? L::ups : T(0));
  const T s = (m - T(1)) / (m + T(1)), square = s * s;
  T sum = T(1) / T(2 * L::log_terms + 1);
  for (int k = L::log_terms - 1; k >= 0; --k) sum = sum * square + T(1) / T(2 * k + 1);
  const T found = e * L::log2 + (e * L::log2_rest + T(2) * s * sum);
  const T infinite = bits<T>(Word(~mantissa & (~Word(0) >> 1)));
  return x > T(0) ? (x == infinite ? x : found) : x == T(0) ? -infinite : x != x ? x : bits<T>(Word(~mantissa | 1));
}

// --- instructions ---

// result, vectors of the operands, their constants and the result's, number of elements
template <class T>
using Loop = void (*)(T* to, const T* const* from, const T* k, int64_t n);

template <bool constant, class T>
FUSEDOPT_HD T operand(const T* x, T k, int64_t i) {
  return constant ? k : k * x[i];
}

template <int Code, class T>
struct PairLoop {
  static constexpr int outer = Code % kOuters, root_at = Code / kOuters % kRoots,
                       inner = Code / (int(kOuters) * kRoots);
  static constexpr bool x_constant = outer == kPlusK || outer == kOverK || outer == kByK;
  static constexpr bool y_constant = inner == kDivKV, z_constant = inner == kAddVK || inner == kDivVK;

  static FUSEDOPT_HD T of(T y, T z) {
    if (root_at == kRootOfFirst) y = root(y);
    const T r = inner == kSame ? y : inner == kAddVV || inner == kAddVK ? y + z : inner == kMulVV ? y * z : y / z;
    return root_at == kRootOfResult ? root(r) : r;
  }
  static FUSEDOPT_HD T with(T x, T r) {
    return outer == kNoOuter                    ? r
           : outer == kPlusV || outer == kPlusK ? x + r
           : outer == kTimesV                   ? x * r
           : outer == kOverV || outer == kOverK ? x / r
                                                : r / x;
  }
  static void run(T* to, const T* const* from, const T* k, int64_t n) {
    const T *x = from[0], *y = from[1], *z = from[2];
    const T kx = k[0], ky = k[1], kz = k[2], result = k[4];
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const T b = operand<y_constant>(y, ky, i), c = inner == kSame ? b : operand<z_constant>(z, kz, i);
      const T r = result * of(b, c);
      to[i] = outer == kNoOuter ? r : with(operand<x_constant>(x, kx, i), r);
    }
  }
};

template <int Code, class T>
struct FmaLoop {
  static void run(T* to, const T* const* from, const T* k, int64_t n) {
    const T *x = from[0], *y = from[1], *z = from[2];
    const T kx = k[0], ky = k[1], kz = k[2], result = k[4];
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const T a = operand<false>(x, kx, i);
      to[i] = result * fma1((Code & 4) != 0 ? root(a) : a, operand<(Code & 2) != 0>(y, ky, i),
                            operand<(Code & 1) != 0>(z, kz, i));
    }
  }
};

template <int Code, class T>
struct LerpLoop {
  static void run(T* to, const T* const* from, const T* k, int64_t n) {
    const T *x = from[0], *y = from[1], *z = from[2];
    const T kx = k[0], ky = k[1], kz = k[2], result = k[4];
    if (Code == 0) {
      FUSEDOPT_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) to[i] = result * lerp(kx * x[i], ky * y[i], kz * z[i]);
    } else if (kz < T(0.5)) {  // as lerp() does
      FUSEDOPT_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        const T a = kx * x[i];
        to[i] = result * fma1(kz, ky * y[i] - a, a);
      }
    } else {
      const T rest = T(1) - kz;
      FUSEDOPT_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        const T b = ky * y[i];
        to[i] = result * (b - (b - kx * x[i]) * rest);
      }
    }
  }
};

template <int Code, class T>
struct SelectLoop {
  static constexpr int compare = Code / 8;

  static FUSEDOPT_HD bool holds(T a, T b) {
    return compare == kLess           ? a < b
           : compare == kLessEqual    ? a <= b
           : compare == kGreater      ? a > b
           : compare == kGreaterEqual ? a >= b
           : compare == kEqual        ? a == b
                                      : a != b;
  }
  static void run(T* to, const T* const* from, const T* k, int64_t n) {
    const T *x = from[0], *y = from[1], *z = from[2], *w = from[3];
    const T kx = k[0], ky = k[1], kz = k[2], kw = k[3];
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const T a = operand<false>(x, kx, i), b = operand<(Code & 4) != 0>(y, ky, i);
      const T yes = operand<(Code & 2) != 0>(z, kz, i), no = operand<(Code & 1) != 0>(w, kw, i);
      to[i] = holds(a, b) ? yes : no;
    }
  }
};

template <int Code, class T>
struct BoundLoop {
  static void run(T* to, const T* const* from, const T* k, int64_t n) {
    const T *x = from[0], *y = from[1];
    const T kx = k[0], ky = k[1], result = k[4];
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const T a = operand<Code % 3 == 2>(x, kx, i), b = operand<Code % 3 == 1>(y, ky, i);
      to[i] = result * (Code / 3 == kMaximum ? maximum(a, b) : minimum(a, b));
    }
  }
};

template <int Code, class T>
struct UnaryLoop {
  static void run(T* to, const T* const* from, const T* k, int64_t n) {
    const T* x = from[0];
    const T kx = k[0], result = k[4];
    FUSEDOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const T a = kx * x[i];
      to[i] = result * (Code == kAbs    ? magnitude(a)
                        : Code == kSign ? sign(a)
                        : Code == kExp  ? exponential_of(a)
                                        : logarithm_of(a));
    }
  }
};

template <int Code, class T>
constexpr Loop<T> loop_of() {
  if constexpr (Code < kFmas) {
    return PairLoop<Code - kPairs, T>::run;
  } else if constexpr (Code < kLerps) {
    return FmaLoop<Code - kFmas, T>::run;
  } else if constexpr (Code < kSelects) {
    return LerpLoop<Code - kLerps, T>::run;
  } else if constexpr (Code < kBounds) {
    return SelectLoop<Code - kSelects, T>::run;
  } else if constexpr (Code < kUnary) {
    return BoundLoop<Code - kBounds, T>::run;
  } else {
    return UnaryLoop<Code - kUnary, T>::run;
  }
}

template <class T>
struct Loops {
  Loop<T> of[kCodes];
};
template <class T, size_t... code>
constexpr Loops<T> all_loops(Indices<code...>) {
  return {{loop_of<int(code), T>()...}};
}
template <class T>
constexpr Loops<T> loops = all_loops<T>(typename IndicesTo<kCodes>::type());

// --- numbers ---

double raised(double x, double y) {
  if (y >= 0 && y <= 9007199254740992.0 && y == double(int64_t(y))) return power(x, int64_t(y));
  if (y < 0 && y >= -9007199254740992.0 && y == double(int64_t(y))) return 1 / power(x, int64_t(-y));
  return exponential_of(y * logarithm_of(x));
}

double exponential_number(double x) { return x >= -700 && x <= 0 ? exponential(x) : exponential_of(x); }

double compute(const Number& n, const double* v) {
  const double a = v[n.a], b = v[n.b], c = v[n.c];
  switch (n.op) {
    case kLiteral:
      return n.literal;
    case kAdd:
      return a + b;
    case kSubtract:
      return a - b;
    case kMultiply:
      return a * b;
    case kDivide:
      return a / b;
    case kPower:
      return raised(a, b);
    case kNegative:
      return -a;
    case kAbsolute:
      return magnitude(a);
    case kSignOf:
      return sign(a);
    case kSquareRoot:
      return root(a);
    case kExponential:
      return exponential_number(a);
    case kLogarithm:
      return logarithm_of(a);
    case kMax:
      return maximum(a, b);
    case kMin:
      return minimum(a, b);
    case kFma:
      return fma1(a, b, c);
    case kLerp:
      return lerp(a, b, c);
    case kIs:
      return a == b;
    case kIsNot:
      return a != b;
    case kIsLess:
      return a < b;
    case kIsAtMost:
      return a <= b;
    case kAnd:
      return a != 0 && b != 0;
    case kOr:
      return a != 0 || b != 0;
    case kNot:
      return a == 0;
    default:
      return a != 0 ? b : c;
  }
}

// Appends the computed numbers to v, from v[n_given] on.
void compute_all(const Number* numbers, int n, double* v, int n_given) {
  for (int i = 0; i < n; ++i) v[n_given + i] = compute(numbers[i], v);
}

int given(const Program& program, const double* hyper, const Clock& clock, const double* sums, double length,
          double* v) {
  for (int h = 0; h < program.n_hyper; ++h) v[h] = hyper[h];
  v[program.n_hyper] = double(clock.t);
  v[program.n_hyper + 1] = clock.carry;
  v[program.n_hyper + 2] = length;
  for (int s = 0; s < kMaxSums; ++s) v[program.n_hyper + 3 + s] = sums ? sums[s] : 0;
  return program.n_hyper + kClockNumbers;
}

void advance(const void* self, const double* hyper, Clock& clock) {
  const Program& program = *static_cast<const Program*>(self);
  ++clock.t;
  if (program.n_carry == 0) return;
  double v[kMaxNumbers];
  const int n = given(program, hyper, clock, nullptr, 0, v);
  compute_all(program.carry, program.n_carry, v, n);
  const double carry = v[n + program.n_carry - 1];
  clock.carry = clock.single ? double(float(carry)) : carry;
}

// --- a kernel ---

template <class T>
struct Prepared {
  static constexpr int kConstants = int((kPreparedBytes - 16) / sizeof(T));
  alignas(8) int code;
  T scale;  // of the gradient
  alignas(16) T constants[kConstants];
};
static_assert(sizeof(Prepared<double>) == kPreparedBytes && sizeof(Prepared<float>) == kPreparedBytes, "layout");
static_assert(Prepared<double>::kConstants == kMaxConstants, "Prepared holds kMaxConstants");

template <class T>
void prepare_pass(const void* self, int pass, const double* hyper, const Clock& clock, double scale, const double* sums,
                  int64_t length, void* prepared) {
  const Program& program = *static_cast<const ProgramKernel*>(self)->program;
  double v[kMaxNumbers];
  compute_all(program.numbers, program.n_numbers, v, given(program, hyper, clock, sums, double(length), v));
  auto& ready = *static_cast<Prepared<T>*>(prepared);
  ready.code = pass << program.n_conditions;
  for (int c = 0; c < program.n_conditions; ++c) ready.code |= int(v[program.conditions[c]] != 0) << c;
  ready.scale = T(scale);
  const Variant& code = program.variants[ready.code];
  ready.constants[0] = T(1);
  for (int k = 1; k < code.n_constants; ++k) ready.constants[k] = T(code.signs[k] * v[code.constants[k]]);
}

template <class T>
void prepare(const void* self, const double* hyper, const Clock& clock, double scale, void* prepared) {
  prepare_pass<T>(self, 0, hyper, clock, scale, nullptr, 0, prepared);
}

FUSEDOPT_HD void* moved(void* p, int64_t n, int size) { return static_cast<char*>(p) + n * size; }
FUSEDOPT_HD const void* moved(const void* p, int64_t n, int size) { return static_cast<const char*>(p) + n * size; }

// `n` elements of a span from `begin` on, a multiple of kBlock.
Span part_of(const ProgramKernel& kernel, const Span& span, int64_t begin, int64_t n) {
  Span s = span;
  s.n = n;
  s.first = span.first + begin;
  s.param = moved(span.param, begin, kernel.size_param);
  s.grad = moved(span.grad, begin, kernel.size_grad);
  if (span.residual) s.residual = moved(span.residual, begin, kernel.size_residual);
  for (int k = 0; k < kernel.program->n_states; ++k) {
    s.state[k] = moved(span.state[k], begin, kernel.size_state);
    if (span.scale[k]) s.scale[k] = span.scale[k] + begin / kBlock;
  }
  return s;
}

template <class T>
struct Ready {
  Loop<T> run;
  int to, from[4];
  T k[5];
};

FUSEDOPT_HD void prefetch(const char* at) {
#if defined(__GNUC__)
  __builtin_prefetch(at);
#else
  (void)at;
#endif
}

// Prefetches the operands of the next tile, a share of them before each instruction. Otherwise memory would be idle
// while an instruction computes on what is in the cache.
class Ahead {
 public:
  Ahead(const ProgramKernel& kernel, const Variant& code, bool updates, const Span& span, int64_t tile) {
    if (span.n <= tile || code.n_instructions == 0) return;
    auto add = [&](int r, const void* at, int size) {
      const int64_t bytes = tile * size, lines = (bytes + kLine - 1) / kLine;
      const int64_t share = (lines + code.n_instructions - 1) / code.n_instructions * kLine;
      if (code.needed >> r & 1 || (updates && r != 1)) operands_[n_++] = {static_cast<const char*>(at), bytes, share};
    };
    add(0, span.param, kernel.size_param);
    if (span.residual) add(0, span.residual, kernel.size_residual);
    add(1, span.grad, kernel.size_grad);
    for (int k = 0; k < kernel.program->n_states; ++k) add(2 + k, span.state[k], kernel.size_state);
  }
  // Before the instruction i, while the tile with this number is updated.
  FUSEDOPT_HD void prefetch_share(int64_t number, int i) const {
    for (int o = 0; o < n_; ++o) {
      const Operand& x = operands_[o];
      const char* const next = x.at + (number + 1) * x.bytes;
      const int64_t begin = i * x.share, end = begin + x.share < x.bytes ? begin + x.share : x.bytes;
      for (int64_t b = begin; b < end; b += kLine) prefetch(next + b);
    }
  }

 private:
  struct Operand {
    const char* at;
    int64_t bytes, share;  // of a tile, and of what is prefetched before each instruction
  } operands_[3 + kMaxStates];
  int n_ = 0;
};

// Runs the prepared variant over a span, one tile at a time. After each tile it calls then(part, registers, n); `part`
// is the tile's part of the span, set only if the operands were decoded.
template <class T, class Then>
FUSEDOPT_HD void run(const void* self, const void* prepared, const Span& span, Then&& then) {
  const ProgramKernel& kernel = *static_cast<const ProgramKernel*>(self);
  const auto& ready = *static_cast<const Prepared<T>*>(prepared);
  const Variant& code = kernel.program->variants[ready.code];
  const int n_states = kernel.program->n_states;
  alignas(64) char room[kCache];
  T* registers[kMaxRegisters];
  Ready<T> instructions[kMaxInstructions];
  int64_t tile = kCache / int64_t(sizeof(T)) / code.n_registers / kBlock * kBlock;
  if (tile > kLongestTile) tile = kLongestTile;
  for (int r = 0; r < code.n_registers; ++r) registers[r] = reinterpret_cast<T*>(room) + r * tile;
  T* const scaled = registers[1];
  for (int i = 0; i < code.n_instructions; ++i) {
    const Instruction& from = code.instructions[i];
    Ready<T>& to = instructions[i];
    to.run = loops<T>.of[from.code];
    to.to = from.to;
    for (int o = 0; o < 4; ++o) to.from[o] = from.from[o];
    for (int o = 0; o < 5; ++o) to.k[o] = ready.constants[from.constant[o]];
  }
  const bool updates = ready.code >> kernel.program->n_conditions == kernel.program->n_passes;
  const Ahead ahead(kernel, code, updates, span, tile);
  void* decoded[2 + kMaxStates] = {};  // what the codec of the form decodes
  for (int r = 0; r < 2 + n_states; ++r)
    if (code.needed >> r & 1) decoded[r] = registers[r];
  const bool scales = ready.scale != T(1) && decoded[1];
  const T scale[] = {T(1), T(1), T(1), T(1), ready.scale};
  int64_t number = 0;
  for (int64_t begin = 0; begin < span.n; begin += tile, ++number) {
    const int64_t n = span.n - begin < tile ? span.n - begin : tile;
    Span part;
    if (kernel.direct) {
      registers[0] = static_cast<T*>(span.param) + begin;
      registers[1] = const_cast<T*>(static_cast<const T*>(span.grad)) + begin;
      for (int k = 0; k < n_states; ++k) registers[2 + k] = static_cast<T*>(span.state[k]) + begin;
    } else {
      part = part_of(kernel, span, begin, n);
      kernel.form.decode(part, n_states, kernel.codes, decoded[0], decoded[1], decoded + 2);
    }
    if (scales) {
      const T* const g[4] = {registers[1], registers[1], registers[1], registers[1]};
      PairLoop<(int(kSame) * kRoots + kNoRoot) * kOuters + kNoOuter, T>::run(scaled, g, scale, n);
      registers[1] = scaled;
    }
    for (int i = 0; i < code.n_instructions; ++i) {
      const Ready<T>& at = instructions[i];
      if (begin + tile < span.n) ahead.prefetch_share(number, i);
      const T* const from[4] = {registers[at.from[0]], registers[at.from[1]], registers[at.from[2]],
                                registers[at.from[3]]};
      at.run(registers[at.to], from, at.k, n);
    }
    then(part, registers, n);
  }
}

template <class T>
void update(const void* self, const void* prepared, const Span& span) {
  const ProgramKernel& kernel = *static_cast<const ProgramKernel*>(self);
  run<T>(self, prepared, span, [&](const Span& part, T* const* registers, int64_t) {
    if (!kernel.direct)
      kernel.form.encode(part, kernel.program->n_states, kernel.codes, registers[0],
                         reinterpret_cast<void* const*>(registers + 2));
  });
}

// Adds n numbers or their squares to the lanes, in double.
template <bool squares, class T>
void add_to_lanes(const T* x, int64_t n, double* lanes) {
  auto term = [](T number) { return squares ? double(number) * double(number) : double(number); };
  double lane[kSumLanes];
  for (int k = 0; k < kSumLanes; ++k) lane[k] = lanes[k];
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int k = 0; k < kSumLanes; ++k) lane[k] += term(x[i + k]);
  for (int k = 0; i < n; ++i, ++k) lane[k] += term(x[i]);
  for (int k = 0; k < kSumLanes; ++k) lanes[k] = lane[k];
}

template <class T>
void add(const void* self, const void* prepared, const Span& span, double* lanes) {
  const Program& program = *static_cast<const ProgramKernel*>(self)->program;
  const int code = static_cast<const Prepared<T>*>(prepared)->code, pass = code >> program.n_conditions;
  int first = 0;
  for (int p = 0; p < pass; ++p) first += program.n_sums[p];
  const Variant& variant = program.variants[code];
  run<T>(self, prepared, span, [&](const Span&, T* const* registers, int64_t n) {
    for (int s = 0; s < program.n_sums[pass]; ++s) {
      const T* const x = registers[variant.results[s]];
      if (program.squares[first + s]) {
        add_to_lanes<true>(x, n, lanes + s * kSumLanes);
      } else {
        add_to_lanes<false>(x, n, lanes + s * kSumLanes);
      }
    }
  });
}

constexpr Interpreter all = {advance,
                             {nullptr, prepare<double>, update<double>, nullptr},
                             {nullptr, prepare<float>, update<float>, nullptr},
                             {0, {}, prepare_pass<double>, add<double>},
                             {0, {}, prepare_pass<float>, add<float>}};

}  // namespace

const Interpreter& FUSEDOPT_CAT(interpreter_, FUSEDOPT_ISA)() { return all; }

}  // namespace fusedopt
