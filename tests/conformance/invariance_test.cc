// Rows of the table that promise the same bits alone or in company (Traits::batch_invariant): a
// sequence's result does not depend on the sequences beside it, on their order, nor on the number
// of threads; over caches, where nothing is left out, not on how many queries a call brings either.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/attention_implementation.h"
#include "tests/conformance/paged_problem.h"
#include "tests/conformance/tested_table.h"
#include "tests/core/core_fixture.h"
#include "tests/kernels/flash_runner.h"
#include "tests/kernels/problem_parts.h"
#include "tests/reference/problem_builder.h"

namespace attn {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using reference::PagedProblem;
using reference::ProblemCase;
using reference::ProblemPart;
using reference::ProblemParts;

class InvarianceTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    row_ = FindImplementation(TestedImplementations(), GetParam());
    implementation_ = row_->create();
  }

  void Attend(TestDevice& test, const AttentionArgs& args) {
    AttentionShape shape = ShapeOf(args);
    shape.sparsity = sparsity_;
    ASSERT_TRUE(row_->supports(shape).ok());
    test.Execute([&](ExecutionContext& context) {
      context.sparsity = sparsity_;
      const absl::Status status = implementation_->Attend(args, shape, context);
      ASSERT_TRUE(status.ok()) << status;
    });
  }

  // `calls`: the parts of each call. All rows are in one of them.
  void ExpectBits(TestDevice& test, const AttentionArgs& whole, const std::vector<char>& bits,
                  const std::vector<std::vector<ProblemPart>>& calls) {
    reference::PoisonResults(whole);
    for (const std::vector<ProblemPart>& call : calls) {
      const ProblemParts parts(whole, call);
      Attend(test, parts.args());
    }
    EXPECT_TRUE(reference::ResultBits(whole) == bits)
        << calls.size() << " calls, " << test.device().executor().threads() << " threads";
  }

  std::vector<char> Bits(const AttentionArgs& args) {
    reference::PoisonResults(args);
    Attend(two_, args);
    return reference::ResultBits(args);
  }

  SparsityOptions sparsity_;  // not set: an approximate row leaves out what it does by default
  const ImplementationRow* row_ = nullptr;
  std::unique_ptr<AttentionImplementation> implementation_;
  TestDevice one_{1};
  TestDevice two_{2};
  TestDevice many_{9};
};

ProblemCase Ragged() {
  ProblemCase c;
  c.batch = 5;
  c.ragged = true;
  c.heads = 4;
  c.kv_heads = 2;
  c.q_len = 40;
  c.kv_len = 2500;
  c.head_dim = 16;
  c.value_dim = 24;
  c.causal = true;
  return c;
}

TEST_P(InvarianceTest, SequencesAloneOrInCompany) {
  for (const ElementType dtype :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
    ProblemCase c = Ragged();
    c.dtype = c.output_dtype = dtype;
    const reference::AttentionProblem plain(c);
    c.window_left = 700;
    const PagedProblem paged(c, dtype, true);
    for (const AttentionArgs* args : {&plain.args(), &paged.args()}) {
      const std::vector<char> bits = Bits(*args);
      const auto all = [&](std::int64_t sequence) {
        return reference::WholeSequence(*args, sequence);
      };
      for (TestDevice* test : {&one_, &two_, &many_}) {
        ExpectBits(*test, *args, bits, {{all(0)}, {all(1)}, {all(2)}, {all(3)}, {all(4)}});
        ExpectBits(*test, *args, bits, {{all(4), all(2), all(0)}, {all(3), all(1)}});
      }
    }
  }
}

// What an approximate row leaves out may depend on how many queries come together; with nothing
// left out it does as the exact ones.
TEST_P(InvarianceTest, DecodeAndPrefillOfACache) {
  sparsity_.factor = 0.0;
  for (const ElementType cache :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16, ElementType::kInt8}) {
    ProblemCase c = Ragged();
    c.dtype = cache == ElementType::kInt8 ? ElementType::kBFloat16 : cache;
    const PagedProblem problem(c, cache, false);
    const AttentionArgs& args = problem.args();
    const std::vector<char> bits = Bits(args);
    for (TestDevice* test : {&one_, &two_, &many_}) {
      for (const std::int64_t rows : {1, 33}) {
        std::vector<std::vector<ProblemPart>> calls;
        for (std::int64_t sequence = 0; sequence < c.batch; ++sequence) {
          // Sequences take their steps together while they last.
          const std::vector<ProblemPart> chunks = reference::ChunksOf(args, sequence, rows);
          if (chunks.size() > calls.size()) calls.resize(chunks.size());
          for (std::size_t i = 0; i < chunks.size(); ++i) calls[i].push_back(chunks[i]);
        }
        ExpectBits(*test, args, bits, calls);
      }
    }
  }
}

std::vector<std::string> InvariantRows() {
  std::vector<std::string> names;
  for (const ImplementationRow& row : TestedImplementations()) {
    if (row.traits.batch_invariant) names.push_back(row.name);
  }
  return names;
}

TEST(Invariance, SomeRowPromisesIt) { EXPECT_FALSE(InvariantRows().empty()); }

INSTANTIATE_TEST_SUITE_P(Table, InvarianceTest, testing::ValuesIn(InvariantRows()),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace attn
