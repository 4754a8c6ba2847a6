// What the standard kernel is tested with, for every instruction set.
#pragma once

#include <vector>

#include "tests/reference/problem_builder.h"

namespace attn::reference {

std::vector<ProblemCase> LengthCases();     // around vector widths, panels and blocks of rows
std::vector<ProblemCase> DimensionCases();  // head_dim 1 to 512, value_dim of its own
std::vector<ProblemCase> TypeCases();       // element types in, out and of masks
std::vector<ProblemCase> OptionCases();     // positions, biases, spans, layouts, poison
std::vector<ProblemCase> StageCases();      // every stage with everything that changes it

}  // namespace attn::reference
