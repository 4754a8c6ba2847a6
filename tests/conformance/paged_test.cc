// Every row of the table of implementations on keys and values that lie in a cache's pages, against
// the double-precision reference on the keys that the pages hold.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>

#include "core/attention_implementation.h"
#include "kernels/cpu/isa.h"
#include "tests/conformance/paged_problem.h"
#include "tests/conformance/tested_table.h"
#include "tests/core/core_fixture.h"
#include "tests/reference/attention_reference.h"
#include "tests/reference/expect_close.h"

namespace attn {
namespace {

using kernels::ElementType;
using kernels::MaskType;
using kernels::ScoreStage;
using reference::PagedProblem;
using reference::ProblemCase;

constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kFloat16,
                                  ElementType::kBFloat16};
constexpr ElementType kCacheTypes[] = {ElementType::kFloat32, ElementType::kFloat16,
                                       ElementType::kBFloat16, ElementType::kInt8};

// Query heads share KV heads, no size is a multiple of anything, rows end within a page.
ProblemCase Base() {
  ProblemCase c;
  c.batch = 2;
  c.heads = 4;
  c.kv_heads = 2;
  c.q_len = 5;
  c.kv_len = 141;
  c.head_dim = 20;
  c.value_dim = 13;
  c.causal = true;
  c.ragged = true;
  return c;
}

void AddSizes(std::vector<ProblemCase>& cases) {
  for (const std::int64_t kv_len : {0, 1, 63, 64, 65, 128, 200}) {
    for (const std::int64_t q_len : {0, 1, 7}) {
      ProblemCase c = Base();
      c.kv_len = kv_len;
      c.q_len = q_len;
      c.causal = kv_len % 2 == 0;
      cases.push_back(c);
    }
  }
  for (const std::int64_t dim : {1, 2, 3, 7, 16, 17, 33, 64, 80, 129}) {
    ProblemCase c = Base();
    c.head_dim = dim;
    cases.push_back(c);
    c.head_dim = 24;
    c.value_dim = dim;
    c.kv_heads = dim % 2 == 0 ? 1 : 4;
    cases.push_back(c);
  }
  for (const reference::Layout layout :
       {reference::Layout::kHeadsFirst, reference::Layout::kPacked}) {
    ProblemCase c = Base();
    c.batch = 5;
    c.layout = layout;
    c.misaligned = true;
    cases.push_back(c);
    c.ragged = false;
    cases.push_back(c);
  }
}

void AddWindows(std::vector<ProblemCase>& cases) {
  for (const std::int64_t window : {0, 1, 7, 63, 64, 65, 200}) {
    for (const std::int64_t q_len : {1, 5, 21}) {
      ProblemCase c = Base();
      c.kv_len = 233;
      c.q_len = q_len;
      c.window_left = window;
      cases.push_back(c);
      c.ragged = false;
      c.causal = false;
      c.window_right = 3;
      c.alibi = q_len == 5;
      c.sinks = window == 7;
      cases.push_back(c);
      c.mask = MaskType::kFloat32;
      cases.push_back(c);
    }
  }
  // Queries before, among and behind the keys.
  for (const std::int64_t at : {-9, -3, 0, 100, 139, 150, 400}) {
    ProblemCase c = Base();
    c.first_query_position = at;
    cases.push_back(c);
    c.window_left = 40;
    cases.push_back(c);
  }
}

void AddOptions(std::vector<ProblemCase>& cases) {
  for (const MaskType mask :
       {MaskType::kBool, MaskType::kFloat32, MaskType::kFloat16, MaskType::kBFloat16}) {
    for (int rank = 1; rank <= 4; ++rank) {
      ProblemCase c = Base();
      c.mask = mask;
      c.mask_rank = rank;
      c.mask_extent = rank % 2 == 0 ? 100 : -1;
      c.mask_broadcasts_keys = rank == 3;
      cases.push_back(c);
    }
  }
  for (const ElementType dtype : kTypes) {
    for (const ElementType output : kTypes) {
      ProblemCase c = Base();
      c.dtype = dtype;
      c.output_dtype = output;
      cases.push_back(c);
      c.sinks = true;
      c.soft_cap = 2;
      cases.push_back(c);
      c.alibi = true;
      c.window_left = 30;
      c.logit_magnitude = 100;
      cases.push_back(c);
    }
  }
  for (const ScoreStage stage : {ScoreStage::kScaled, ScoreStage::kSoftCapped, ScoreStage::kMasked,
                                 ScoreStage::kProbabilities}) {
    ProblemCase c = Base();
    c.stage = stage;
    cases.push_back(c);
    c.soft_cap = 1.5f;
    c.window_left = 20;
    c.sinks = true;
    c.dtype = ElementType::kBFloat16;
    cases.push_back(c);
    c.mask = MaskType::kBool;
    cases.push_back(c);
  }
}

std::vector<ProblemCase> AllCases() {
  std::vector<ProblemCase> cases;
  AddSizes(cases);
  AddWindows(cases);
  AddOptions(cases);
  // Each with and without what only some implementations return.
  const std::size_t count = cases.size();
  for (std::size_t i = 0; i < count; ++i) {
    cases.push_back(cases[i]);
    cases.back().lse = true;
    cases.back().seed = 2;
  }
  return cases;
}

// Of the first sequence's output, against the reference on `original`.
double RelativeRms(const kernels::AttentionArgs& args, const kernels::AttentionArgs& original) {
  const reference::ReferenceResult expected = reference::AttentionReference(original)[0];
  const kernels::Sequence& sequence = args.sequences[0];
  double error = 0;
  double size = 0;
  for (std::int64_t row = 0; row < sequence.q_len; ++row) {
    for (std::int64_t head = 0; head < args.num_heads; ++head) {
      for (std::int64_t i = 0; i < args.value_dim; ++i) {
        const std::int64_t at =
            row * sequence.output.row_stride + head * sequence.output.head_stride + i;
        const double want = expected.output[static_cast<std::size_t>(
            (row * args.num_heads + head) * args.value_dim + i)];
        const double got = reference::ReadElement(args.output_dtype, sequence.output.data, at);
        error += (got - want) * (got - want);
        size += want * want;
      }
    }
  }
  return std::sqrt(error / size);
}

class PagedTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    row_ = FindImplementation(TestedImplementations(), GetParam());
    implementation_ = row_->create();
  }

  void Check(const ProblemCase& c, ElementType cache_dtype, bool let_go) {
    const PagedProblem problem(c, cache_dtype, let_go);
    AttentionShape shape = ShapeOf(problem.args());
    shape.sparsity.factor = 0.0;  // approximate rows leave nothing out, and are exact then
    const absl::Status supported = row_->supports(shape);
    if (!supported.ok()) {
      ++refused_[std::string(supported.message())];
      return;
    }
    ++executed_;
    let_go_ += problem.tokens_let_go();
    test_.Execute([&](ExecutionContext& context) {
      context.sparsity = shape.sparsity;
      const absl::Status status = implementation_->Attend(problem.args(), shape, context);
      ASSERT_TRUE(status.ok()) << status;
      const MemoryUsage usage = implementation_->WorkspaceBytes(shape, 2);
      if (usage.exact) {
        EXPECT_EQ(context.workspace.meter().peak(), usage.bytes);
        EXPECT_EQ(context.flops, implementation_->Complexity(shape).flops);
      }
    });
    EXPECT_TRUE(reference::ExpectAttentionClose(
        problem.args(), reference::AttentionReference(problem.rows()),
        kernels::cpu::FlashWeightType(kernels::cpu::ActiveIsa(), problem.args())));
    EXPECT_TRUE(problem.NothingElseWritten());
  }

  const ImplementationRow* row_ = nullptr;
  std::unique_ptr<AttentionImplementation> implementation_;
  TestDevice test_;
  std::map<std::string, int> refused_;
  int executed_ = 0;
  std::int64_t let_go_ = 0;
};

TEST_P(PagedTest, AgreesWithTheReferenceOnWhatThePagesHold) {
  for (const ProblemCase& c : AllCases()) {
    for (const ElementType cache_dtype : kCacheTypes) {
      // Each case has a twin (AllCases): one of the two lets tokens go.
      const bool let_go = (c.seed == 1) != (cache_dtype == c.dtype);
      SCOPED_TRACE(row_->name + "/" + reference::CaseName(c) + "_cache" +
                   std::to_string(static_cast<int>(cache_dtype)) + (let_go ? "_let_go" : ""));
      Check(c, cache_dtype, let_go);
      if (HasFatalFailure()) return;
    }
  }
  EXPECT_GT(executed_, 200);
  EXPECT_GT(let_go_, 10000);
  for (const auto& [reason, count] : refused_) RecordProperty("refused: " + reason, count);
}

// What int8 costs where nothing stands out: keys and values of normal numbers.
TEST_P(PagedTest, Int8IsCloseToTheKeysThatWereAppended) {
  for (const ElementType dtype : kTypes) {
    for (const std::int64_t dim : {64, 128}) {
      ProblemCase c;
      c.heads = 8;
      c.kv_heads = 2;
      c.q_len = 9;
      c.kv_len = 1000;
      c.head_dim = c.value_dim = dim;
      c.causal = true;
      c.dtype = c.output_dtype = dtype;
      const PagedProblem problem(c, ElementType::kInt8, false);
      AttentionShape shape = ShapeOf(problem.args());
      shape.sparsity.factor = 0.0;  // approximate rows leave nothing out, and are exact then
      ASSERT_TRUE(row_->supports(shape).ok());
      test_.Execute([&](ExecutionContext& context) {
        context.sparsity = shape.sparsity;
        const absl::Status status = implementation_->Attend(problem.args(), shape, context);
        ASSERT_TRUE(status.ok()) << status;
      });
      const auto error = RelativeRms(problem.args(), problem.original());
      EXPECT_LE(error, 1e-2) << dim;
      EXPECT_GE(error, 1e-3) << dim << ": the cache was not in int8";
      RecordProperty(
          "relative_rms_" + std::to_string(static_cast<int>(dtype)) + "_" + std::to_string(dim),
          std::to_string(error));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Table, PagedTest, testing::ValuesIn([] {
                           std::vector<std::string> names;
                           for (const ImplementationRow& row : TestedImplementations()) {
                             names.push_back(row.name);
                           }
                           return names;
                         }()),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace attn
