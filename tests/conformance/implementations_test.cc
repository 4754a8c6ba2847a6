// Every row of the table of implementations against the double-precision reference, on the cases
// that the kernels are tested with. What a row says that it can't do is skipped with its reason.
#include <gtest/gtest.h>

#include <map>
#include <string>

#include "core/attention_implementation.h"
#include "kernels/cpu/isa.h"
#include "tests/conformance/tested_table.h"
#include "tests/core/core_fixture.h"
#include "tests/kernels/standard_attention_cases.h"
#include "tests/reference/attention_reference.h"
#include "tests/reference/expect_close.h"

namespace attn {
namespace {

using reference::ProblemCase;

std::vector<ProblemCase> AllCases() {
  std::vector<ProblemCase> cases;
  for (const auto& group : {reference::LengthCases(), reference::DimensionCases(),
                            reference::TypeCases(), reference::OptionCases()}) {
    cases.insert(cases.end(), group.begin(), group.end());
  }
  // The same without what only some implementations return, so that each one sees the options.
  const std::size_t count = cases.size();
  for (std::size_t i = 0; i < count; ++i) {
    if (!cases[i].lse) continue;
    ProblemCase plain = cases[i];
    plain.lse = false;
    cases.push_back(plain);
  }
  const std::vector<ProblemCase> stages = reference::StageCases();
  cases.insert(cases.end(), stages.begin(), stages.end());
  return cases;
}

class ImplementationsTest : public testing::TestWithParam<std::string> {};

TEST_P(ImplementationsTest, AgreesWithTheReferenceWhereverItSaysThatItCan) {
  const ImplementationRow& row = *FindImplementation(TestedImplementations(), GetParam());
  const std::unique_ptr<AttentionImplementation> implementation = row.create();
  TestDevice test;
  std::map<std::string, int> refused;
  int executed = 0;
  for (const ProblemCase& c : AllCases()) {
    reference::AttentionProblem problem(c);
    // A library that multiplies a hidden key's value by zero passes its NaN on: only kernels of our
    // own, which have no estimates to make about their memory, promise more.
    AttentionShape shape = ShapeOf(problem.args());
    shape.sparsity.factor = 0.0;  // approximate rows leave nothing out, and are exact then
    if (!implementation->WorkspaceBytes(shape, 1).exact &&
        (c.hidden_keys_nan || c.nan_key >= 0 || c.infinite_value >= 0)) {
      ++refused["NaN in hidden keys"];
      continue;
    }
    const absl::Status supported = row.supports(shape);
    if (!supported.ok()) {
      ++refused[std::string(supported.message())];
      continue;
    }
    ++executed;
    test.Execute([&](ExecutionContext& context) {
      context.sparsity = shape.sparsity;
      const absl::Status status = implementation->Attend(problem.args(), shape, context);
      ASSERT_TRUE(status.ok()) << status;
      const MemoryUsage usage = implementation->WorkspaceBytes(shape, 2);
      const std::size_t peak = context.workspace.meter().peak();
      if (usage.exact) {
        EXPECT_EQ(peak, usage.bytes) << reference::CaseName(c);
        EXPECT_EQ(context.flops, implementation->Complexity(shape).flops) << reference::CaseName(c);
      } else if (shape.pairs > 0) {
        EXPECT_GT(peak, 0u) << reference::CaseName(c);  // what a library allocates is seen
      }
    });
    EXPECT_TRUE(reference::ExpectAttentionClose(
        problem.args(), reference::AttentionReference(problem.args()),
        kernels::cpu::FlashWeightType(kernels::cpu::ActiveIsa(), problem.args())))
        << row.name << "/" << reference::CaseName(c);
    EXPECT_TRUE(problem.NothingElseWritten()) << row.name << "/" << reference::CaseName(c);
  }
  EXPECT_GT(executed, 100);
  for (const auto& [reason, count] : refused) {
    RecordProperty("refused: " + reason, count);
  }
}

INSTANTIATE_TEST_SUITE_P(Table, ImplementationsTest, testing::ValuesIn([] {
                           std::vector<std::string> names;
                           for (const ImplementationRow& row : TestedImplementations()) {
                             names.push_back(row.name);
                           }
                           return names;
                         }()),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace attn
