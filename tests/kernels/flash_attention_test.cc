// The flash kernel of every instruction set against the double-precision reference; however the
// work is cut, the bits are the same.
#include "kernels/cpu/flash_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "tests/conformance/paged_problem.h"
#include "tests/kernels/flash_runner.h"
#include "tests/kernels/standard_attention_cases.h"
#include "tests/reference/attention_reference.h"
#include "tests/reference/expect_close.h"
#include "tests/reference/problem_builder.h"

namespace attn::reference {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::KeyValueSpan;
using kernels::Mask;
using kernels::MaskType;
using kernels::RowsView;
using kernels::ScoreStage;
using kernels::Sequence;
using kernels::cpu::FlashWeightType;
using kernels::cpu::IsaKernels;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kLowestBFloat16 = -3.3895314e38f;

void CheckAllCuts(const IsaKernels& isa, const AttentionArgs& args) {
  ExpectSameBitsForAllCuts(isa, args);
  EXPECT_TRUE(ExpectAttentionClose(args, AttentionReference(args), FlashWeightType(isa, args)));
}

class FlashCasesTest : public testing::TestWithParam<std::tuple<const IsaKernels*, ProblemCase>> {};

TEST_P(FlashCasesTest, AgreesWithReferenceHoweverItIsCut) {
  const auto& [isa, c] = GetParam();
  AttentionProblem problem(c);
  CheckAllCuts(*isa, problem.args());
  EXPECT_TRUE(problem.NothingElseWritten());
}

std::vector<ProblemCase> StandardCases() {
  std::vector<ProblemCase> cases;
  for (const auto& group : {LengthCases(), DimensionCases(), TypeCases(), OptionCases()}) {
    cases.insert(cases.end(), group.begin(), group.end());
  }
  for (ProblemCase& c : cases) c.stage = ScoreStage::kNone;
  return cases;
}

// Around the borders of steps and segments; one KV head for each of eight workers, so that rows are
// left whole with few workers and split with many.
std::vector<ProblemCase> LongCases() {
  std::vector<ProblemCase> cases;
  for (const int64_t kv_len : {2047, 2048, 2049, 4096, 6000}) {
    for (const int64_t q_len : {1, 3, 13}) {
      ProblemCase c;
      c.heads = c.kv_heads = 8;
      c.q_len = q_len;
      c.kv_len = kv_len;
      c.head_dim = 3;
      c.value_dim = 2;
      c.causal = q_len != 3;
      c.sinks = q_len == 13;
      c.lse = true;
      cases.push_back(c);
    }
  }
  ProblemCase c = cases.back();
  c.logit_magnitude = 1e4;
  cases.push_back(c);
  c.logit_magnitude = 1;
  // Some see nothing of the first segments, some nothing of the last ones, some nothing at all.
  for (const int64_t at : {-6, 2040, 3000, 6080, 9000}) {
    c.first_query_position = at;
    c.window_left = at == 3000 ? 700 : 90;
    c.sinks = at % 3 == 0;
    cases.push_back(c);
  }
  return cases;
}

std::string Name(const testing::TestParamInfo<FlashCasesTest::ParamType>& test) {
  return std::string(std::get<0>(test.param)->name) + "_" + CaseName(std::get<1>(test.param));
}
INSTANTIATE_TEST_SUITE_P(Standard, FlashCasesTest,
                         testing::Combine(testing::ValuesIn(FlashIsas()),
                                          testing::ValuesIn(StandardCases())),
                         Name);
INSTANTIATE_TEST_SUITE_P(Long, FlashCasesTest,
                         testing::Combine(testing::ValuesIn(FlashIsas()),
                                          testing::ValuesIn(LongCases())),
                         Name);

class FlashTest : public testing::TestWithParam<const IsaKernels*> {};

INSTANTIATE_TEST_SUITE_P(Isa, FlashTest, testing::ValuesIn(FlashIsas()),
                         [](const auto& test) { return std::string(test.param->name); });

TEST_P(FlashTest, KeysAreSplitForManyWorkersOnly) {
  ProblemCase c = LongCases().back();
  c.first_query_position.reset();
  c.window_left = -1;
  AttentionProblem problem(c);
  const FlashTasks whole = PlanFlash(problem.args(), {1, 0, false});
  EXPECT_EQ(whole.plan.attend_tasks, 8);
  EXPECT_EQ(whole.plan.merge_tasks, 0);
  EXPECT_TRUE(whole.plan.merges_inside);
  const FlashTasks split = PlanFlash(problem.args(), {64, 0, false});
  EXPECT_EQ(split.plan.attend_tasks, 24);
  EXPECT_EQ(split.plan.merge_tasks, 8);
  EXPECT_FALSE(split.plan.merges_inside);
}

// Elements that a problem's arguments point at, to be overwritten.
float& MaskAt(const AttentionArgs& args, int64_t head, int64_t row, int64_t key) {
  const Mask& mask = args.mask;
  return static_cast<float*>(const_cast<void*>(
      mask.data))[head * mask.head_stride + row * mask.query_stride + key * mask.key_stride];
}
float* RowAt(const RowsView& rows, int64_t row, int64_t head) {
  return static_cast<float*>(const_cast<void*>(rows.data)) + row * rows.row_stride +
         head * rows.head_stride;
}

ProblemCase Masked(int64_t q_len, int64_t kv_len) {
  ProblemCase c;
  c.heads = 2;
  c.q_len = q_len;
  c.kv_len = kv_len;
  c.head_dim = 6;
  c.lse = true;
  c.mask = MaskType::kFloat32;
  c.mask_rank = 3;
  return c;
}

TEST_P(FlashTest, SegmentThatAMaskHidesChangesNothing) {
  for (const bool sinks : {false, true}) {
    for (const int64_t hidden : {0, 2048, 4096}) {
      ProblemCase c = Masked(7, 4500);
      c.sinks = sinks;
      AttentionProblem problem(c);
      const AttentionArgs& args = problem.args();
      for (int64_t row = 0; row < 5; ++row) {
        for (int64_t head = 0; head < 2; ++head) {
          for (int64_t key = 0; key < 4500; ++key) {
            const bool hides = row == 4 || key / 2048 * 2048 == hidden;
            if (hides) MaskAt(args, head, row, key) = -kInfinity;
          }
        }
      }
      CheckAllCuts(*GetParam(), args);
      // Row 4 sees nothing: the sink alone, or nothing.
      const Sequence& sequence = args.sequences[0];
      EXPECT_EQ(sequence.lse[4 * sequence.lse_row_stride],
                sinks ? args.sink_logits[0] : -kInfinity);
    }
  }
}

// The mean of a head's values.
std::vector<double> MeanValue(const KeyValueSpan& span, int64_t value_dim) {
  std::vector<double> mean(static_cast<std::size_t>(value_dim));
  for (int64_t key = 0; key < span.length; ++key) {
    for (std::size_t i = 0; i < mean.size(); ++i) {
      mean[i] += RowAt(span.value, key, 0)[i] / static_cast<double>(span.length);
    }
  }
  return mean;
}

// Models mask with large finite numbers, down to the lowest one: such keys vanish beside others,
// and a row that has no others takes all of its keys alike. So large are they that scores vanish
// beside them, and the reference's tolerance says little.
TEST_P(FlashTest, LargeFiniteMaskIsNotMinusInfinity) {
  for (const float lowest : {-1e9f, -1e10f, -1e20f, -1e38f, -3e38f, kLowestBFloat16, kLowest}) {
    for (const int64_t kv_len : {40, 2100}) {
      AttentionProblem problem(Masked(7, kv_len));
      const AttentionArgs& args = problem.args();
      for (int64_t row = 0; row < 7; ++row) {
        for (int64_t key = 0; key < kv_len; ++key) {
          for (int64_t head = 0; head < 2; ++head) {
            const bool hides = row == 0 || (row < 4 && key % 3 == 0) || (row == 4 && key != 33);
            MaskAt(args, head, row, key) = hides ? lowest : 0.0f;
          }
        }
      }
      SCOPED_TRACE(lowest);
      CheckAllCuts(*GetParam(), args);
      const Sequence& sequence = args.sequences[0];
      const std::vector<double> mean = MeanValue(sequence.spans[0], args.value_dim);
      const RowsView output = {sequence.output.data, sequence.output.row_stride, 0};
      for (std::size_t i = 0; i < mean.size(); ++i) {
        EXPECT_NEAR(RowAt(output, 0, 0)[i], mean[i], 1e-5) << i;
        EXPECT_EQ(RowAt(output, 4, 0)[i], RowAt(sequence.spans[0].value, 33, 0)[i]) << i;
      }
    }
  }
}

TEST_P(FlashTest, NaNAndInfinityStayInRowsThatSeeThem) {
  for (const float special : {kNaN, kInfinity, -kInfinity}) {
    for (const bool in_key : {false, true}) {
      for (const int64_t at : {3, 2060}) {
        ProblemCase c;
        c.heads = 2;
        c.kv_heads = 2;
        c.q_len = 50;
        c.kv_len = 2080;
        c.first_query_position = at - 20;
        c.causal = true;
        c.window_left = 30;  // seen by rows in the middle alone
        c.head_dim = 3;
        c.lse = true;
        AttentionProblem problem(c);
        const AttentionArgs& args = problem.args();
        const KeyValueSpan& span = args.sequences[0].spans[0];
        RowAt(in_key ? span.key : span.value, at, 1)[2] = special;
        SCOPED_TRACE(testing::Message() << special << (in_key ? " key " : " value ") << at);
        CheckAllCuts(*GetParam(), args);
      }
    }
  }
}

TEST_P(FlashTest, NaNOrInfinityInMaskStaysInItsRow) {
  for (const float special : {kNaN, kInfinity}) {
    for (const int64_t at : {69, 2055}) {
      AttentionProblem problem(Masked(14, 2070));
      MaskAt(problem.args(), 1, 4, at) = special;
      CheckAllCuts(*GetParam(), problem.args());
      const Sequence& sequence = problem.args().sequences[0];
      EXPECT_TRUE(std::isnan(sequence.lse[4 * sequence.lse_row_stride + 1]));
      EXPECT_FALSE(std::isnan(sequence.lse[4 * sequence.lse_row_stride]));
      EXPECT_FALSE(std::isnan(sequence.lse[5 * sequence.lse_row_stride + 1]));
    }
  }
}

// A key that is seen, though its weight is too small for a number: what it holds isn't hidden, and
// rows beside it that do not see it don't change that.
TEST_P(FlashTest, NaNOfASeenValueIsNotLostWithItsWeight) {
  ProblemCase c;
  c.q_len = 9;
  c.kv_len = 40;
  c.head_dim = 1;
  c.causal = true;
  c.first_query_position = 25;
  AttentionProblem problem(c);
  const Sequence& sequence = problem.args().sequences[0];
  for (int64_t row = 0; row < 9; ++row) RowAt(sequence.query, row, 0)[0] = 1;
  for (int64_t key = 0; key < 40; ++key) RowAt(sequence.spans[0].key, key, 0)[0] = 0;
  RowAt(sequence.spans[0].key, 30, 0)[0] = -1000;
  RowAt(sequence.spans[0].value, 30, 0)[0] = kNaN;
  ExpectSameBitsForAllCuts(*GetParam(), problem.args());
  const RowsView output = {sequence.output.data, sequence.output.row_stride, 0};
  std::string nan_rows;
  for (int64_t row = 0; row < 9; ++row) nan_rows += std::isnan(*RowAt(output, row, 0)) ? 'n' : '.';
  EXPECT_EQ(nan_rows, ".....nnnn");
}

TEST_P(FlashTest, AgreesWithReferenceOnPages) {
  for (const ElementType cache :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16, ElementType::kInt8}) {
    for (const bool let_go : {false, true}) {
      for (const int64_t q_len : {1, 11}) {
        ProblemCase c;
        c.batch = 2;
        c.heads = 4;
        c.kv_heads = 2;
        c.q_len = q_len;
        c.kv_len = 2200;
        c.head_dim = 6;
        c.value_dim = 5;
        c.causal = true;
        c.window_left = let_go ? 300 : -1;
        c.ragged = true;
        c.lse = true;
        c.dtype = cache == ElementType::kInt8 ? ElementType::kFloat32 : cache;
        const PagedProblem problem(c, cache, let_go);
        EXPECT_GE(problem.tokens_let_go(), let_go ? 1800 : 0);
        ExpectSameBitsForAllCuts(*GetParam(), problem.args());
        EXPECT_TRUE(ExpectAttentionClose(problem.args(), AttentionReference(problem.rows()),
                                         FlashWeightType(*GetParam(), problem.args())));
        EXPECT_TRUE(problem.NothingElseWritten());
      }
    }
  }
}

}  // namespace
}  // namespace attn::reference
