// `_core.add_program`: registers a rule that Python has traced and lowered.
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bind.h"
#include "cpu/programs.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

const char* const inners[] = {"same", "add vv", "add vk", "mul vv", "div vv", "div kv", "div vk"};
const char* const roots[] = {"", " root of first", " root of result"};
const char* const outers[] = {"", " plus v", " plus k", " times v", " over v", " over k", " by v", " by k"};
const char* const compares[] = {"lt", "le", "gt", "ge", "eq", "ne"};
const char* const extremes[] = {"maximum", "minimum"};
const char* const bounds[] = {" vv", " vk", " kv"};
const char* const unaries[] = {"abs", "sign", "exp", "log"};
const char* const number_ops[] = {"literal", "add",  "sub", "mul", "div",     "pow",     "neg", "abs",
                                  "sign",    "sqrt", "exp", "log", "maximum", "minimum", "fma", "lerp",
                                  "eq",      "ne",   "lt",  "le",  "and",     "or",      "not", "where"};
static_assert(sizeof number_ops / sizeof number_ops[0] == kNumberOps, "a name for each operation");

std::string kinds(int constant, int n) {
  std::string s = " ";
  for (int i = n - 1; i >= 0; --i) s += constant >> i & 1 ? "k" : "v";
  return s;
}

// Name -> code. In a name, v is a vector operand and k a constant.
py::dict instructions() {
  py::dict d;
  auto add = [&](int code, const std::string& name) { d[py::str(name)] = code; };
  for (int code = kPairs; code < kFmas; ++code) {
    const int i = code - kPairs;
    add(code, std::string(inners[i / (int(kOuters) * kRoots)]) + roots[i / kOuters % kRoots] + outers[i % kOuters]);
  }
  for (int i = 0; i < 8; ++i) add(kFmas + i, std::string("fma") + (i & 4 ? " root of first" : "") + kinds(i & 3, 2));
  for (int i = 0; i < 2; ++i) add(kLerps + i, "lerp" + kinds(i, 1));
  for (int i = 0; i < kCompares * 8; ++i) add(kSelects + i, std::string(compares[i / 8]) + kinds(i % 8, 3));
  for (int i = 0; i < kExtremes * 3; ++i) add(kBounds + i, std::string(extremes[i / 3]) + bounds[i % 3]);
  for (int i = 0; i < kUnaries; ++i) add(kUnary + i, unaries[i]);
  return d;
}

using NumberTuple = std::tuple<std::string, int16_t, int16_t, int16_t, double>;
using InstructionTuple = std::tuple<int16_t, int16_t, std::array<int16_t, 4>, std::array<int16_t, 5>>;
using CodeTuple =
    std::tuple<std::vector<InstructionTuple>, std::vector<std::pair<int16_t, int8_t>>, int, std::vector<int16_t>>;

std::vector<Number> numbers_of(const std::vector<NumberTuple>& given) {
  std::vector<Number> out;
  for (const auto& [name, a, b, c, literal] : given) {
    int16_t op = 0;
    while (op < kNumberOps && name != number_ops[op]) ++op;
    out.push_back({op, a, b, c, literal});
  }
  return out;
}

std::string joined(const std::vector<std::string>& words) {
  std::string s;
  for (const std::string& w : words) s += (s.empty() ? "" : " ") + w;
  return s;
}

int add(std::string name, const std::vector<std::string>& hyper, const std::vector<std::string>& states,
        const std::vector<std::string>& codes, const std::vector<NumberTuple>& numbers,
        const std::vector<NumberTuple>& carry, std::vector<int16_t> conditions, std::vector<std::vector<bool>> passes,
        const std::vector<CodeTuple>& variants) {
  ProgramSource s{std::move(name),   joined(hyper),         joined(states),    {}, numbers_of(numbers),
                  numbers_of(carry), std::move(conditions), std::move(passes), {}};
  for (const std::string& c : codes)
    s.codes.push_back(c == "int8" ? kSigned : c == "uint8" ? kNonNegative : kNotQuantised);
  for (const auto& [instructions, constants, registers, results] : variants) {
    CodeSource v{{}, {}, {}, registers, results};
    for (const auto& [code, to, from, constant] : instructions) {
      Instruction i{code, to, {}, {}};
      for (size_t k = 0; k < 4; ++k) i.from[k] = from[k];
      for (size_t k = 0; k < 5; ++k) i.constant[k] = constant[k];
      v.instructions.push_back(i);
    }
    for (const auto& [number, sign] : constants) {
      v.constants.push_back(number);
      v.signs.push_back(sign);
    }
    s.variants.push_back(std::move(v));
  }
  return add_program(std::move(s));
}

}  // namespace

void bind_programs(py::module_& m) {
  m.def("instructions", &instructions, "The interpreter's instructions: name -> code.");
  m.attr("MAX_STATES") = kMaxStates;
  m.attr("MAX_CONSTANTS") = kMaxConstants;
  m.attr("MAX_CONDITIONS") = kMaxConditions;
  m.attr("MAX_REGISTERS") = kMaxRegisters;
  m.attr("MAX_INSTRUCTIONS") = kMaxInstructions;
  m.attr("MAX_NUMBERS") = kMaxNumbers;
  m.attr("MAX_SUMS") = kMaxSums;
  m.def("add_program", &add, py::arg("name"), py::arg("hyper"), py::arg("states"), py::arg("codes"), py::arg("numbers"),
        py::arg("carry"), py::arg("conditions"), py::arg("passes"), py::arg("variants"),
        "Registers a traced rule; returns the index of its kernels.");
}

}  // namespace fusedopt
