// Registers programs (program.h): checks a program and adds it as a kernel library of one rule, with a kernel for every
// form and instruction set. Registered programs live as long as the process.
#pragma once
#include <string>
#include <vector>

#include "cpu/program.h"

namespace fusedopt {

// The parts of a program, owned.
struct CodeSource {
  std::vector<Instruction> instructions;
  std::vector<int16_t> constants;
  std::vector<int8_t> signs;
  int n_registers;
  std::vector<int16_t> results;  // of a pass: the registers to sum
};
struct ProgramSource {
  std::string name, hyper, states;  // hyper, states: names separated by blanks
  std::vector<Format> codes;        // of the states: see Rule
  std::vector<Number> numbers, carry;
  std::vector<int16_t> conditions;
  std::vector<std::vector<bool>> passes;  // for each pass and sum: whether it is of squares
  std::vector<CodeSource> variants;       // for each pass and for the update: one per combination of the conditions
};

// Returns the number of the rule. Throws std::invalid_argument if any index or count is out of range.
int add_program(ProgramSource source);

}  // namespace fusedopt
