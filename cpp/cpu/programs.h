// Registers rules that are data (program.h): checks a program, and adds it as a kernel library of one rule, with a
// kernel in every form, for each instruction set. They live as long as the process.
#pragma once
#include <string>
#include <vector>

#include "cpu/program.h"

namespace fusedopt {

// What a program is made of, with memory of its own.
struct CodeSource {
  std::vector<Instruction> instructions;
  std::vector<int16_t> constants;
  std::vector<int8_t> signs;
  int n_registers;
  std::vector<int16_t> results;  // of a pass: the registers that are summed
};
struct ProgramSource {
  std::string name, hyper, states;  // hyper and states: names, separated by blanks
  std::vector<Format> codes;        // of the states: see Rule
  std::vector<Number> numbers, carry;
  std::vector<int16_t> conditions;
  std::vector<std::vector<bool>> passes;  // of each, for every sum: whether it is one of squares
  std::vector<CodeSource> variants;       // of each pass and the update, one for each combination of the conditions
};

// Returns the number of the rule. Throws std::invalid_argument where something is out of range.
int add_program(ProgramSource source);

}  // namespace fusedopt
