#include "kernels/cpu/standard_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <ostream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/standard_scratch.h"
#include "tests/kernels/standard_attention_cases.h"
#include "tests/reference/attention_reference.h"
#include "tests/reference/expect_close.h"
#include "tests/reference/problem_builder.h"

namespace attn::kernels::cpu {
static void PrintTo(const IsaKernels* isa, std::ostream* out) { *out << isa->name; }
}  // namespace attn::kernels::cpu

namespace attn::reference {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::KeyValueSpan;
using kernels::MaskType;
using kernels::Sequence;
using kernels::cpu::IsaKernels;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<const IsaKernels*> RunnableIsas() {
  const kernels::cpu::IsaTable table = kernels::cpu::CompiledIsas();
  std::vector<const IsaKernels*> isas;
  for (int64_t i = 0; i < table.size; ++i) {
    if (table.rows[i].supported()) isas.push_back(&table.rows[i]);
  }
  return isas;
}

// Runs all tasks, last one first, in a workspace that is NaN, exactly as large as planned and
// guarded behind.
void RunAllTasks(const IsaKernels& isa, const AttentionArgs& args,
                 const bool* cancelled = nullptr) {
  const kernels::TaskPlan plan = kernels::cpu::PlanStandardAttention(args);
  constexpr std::size_t kGuard = 64;
  const std::size_t bytes = (plan.task_workspace_bytes + 63) / 64 * 64 + kGuard;
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(64, bytes),
                                                              &std::free);
  auto* const memory = static_cast<uint8_t*>(workspace.get());
  for (int64_t task = plan.num_tasks - 1; task >= 0; --task) {
    std::fill_n(memory, bytes, uint8_t{0xff});
    isa.standard_attention(args, task, memory, cancelled);
    for (std::size_t i = plan.task_workspace_bytes; i < bytes; ++i) ASSERT_EQ(memory[i], 0xff);
  }
}

class StandardAttentionTest
    : public testing::TestWithParam<std::tuple<const IsaKernels*, ProblemCase>> {
 public:
  static std::string Name(const testing::TestParamInfo<ParamType>& test) {
    return std::string(std::get<0>(test.param)->name) + "_" + CaseName(std::get<1>(test.param));
  }
};

TEST_P(StandardAttentionTest, AgreesWithReference) {
  const auto& [isa, c] = GetParam();
  AttentionProblem problem(c);
  RunAllTasks(*isa, problem.args());
  EXPECT_TRUE(ExpectAttentionClose(problem.args(), AttentionReference(problem.args())));
  EXPECT_TRUE(problem.NothingElseWritten());
}

// More keys than are packed at a time, more rows than meet them together, steps that only some rows
// see, keys of a page in several spans.
std::vector<ProblemCase> StepCases() {
  ProblemCase c;
  c.heads = 2;
  c.q_len = 209;
  c.kv_len = 601;
  c.value_dim = 36;
  c.spans = 3;
  c.lse = true;
  std::vector<ProblemCase> cases = {c};
  c.causal = c.hidden_keys_nan = true;
  cases.push_back(c);
  c.first_query_position = 70;  // nobody sees the last steps
  cases.push_back(c);
  c.window_left = 40;
  cases.push_back(c);
  c.soft_cap = 2;
  c.dtype = ElementType::kBFloat16;
  cases.push_back(c);
  for (const kernels::ScoreStage stage :
       {kernels::ScoreStage::kScaled, kernels::ScoreStage::kSoftCapped,
        kernels::ScoreStage::kMasked, kernels::ScoreStage::kProbabilities}) {
    c.dtype = ElementType::kFloat32;
    c.stage = stage;
    c.hidden_keys_nan = false;
    cases.push_back(c);
  }
  c.stage = kernels::ScoreStage::kNone;
  for (const int64_t key : {100, 300}) {  // of the first step, of one that follows
    c.nan_key = key;
    c.infinite_value = -1;
    cases.push_back(c);
    c.nan_key = -1;
    c.infinite_value = key;
    cases.push_back(c);
  }
  c.q_len = 3;  // keys and values where they lie
  cases.push_back(c);
  return cases;
}

#define ATTN_INSTANTIATE(name)                                                               \
  INSTANTIATE_TEST_SUITE_P(                                                                  \
      name, StandardAttentionTest,                                                           \
      testing::Combine(testing::ValuesIn(RunnableIsas()), testing::ValuesIn(name##Cases())), \
      StandardAttentionTest::Name)
ATTN_INSTANTIATE(Length);
ATTN_INSTANTIATE(Dimension);
ATTN_INSTANTIATE(Type);
ATTN_INSTANTIATE(Option);
ATTN_INSTANTIATE(Stage);
ATTN_INSTANTIATE(Step);

// One head, one query of zeros, `keys` keys of zeros: scores are what the mask says.
struct MaskOnly {
  MaskOnly(std::vector<float> scores, int64_t value_dim)
      : mask(std::move(scores)),
        zeros(mask.size()),
        values(mask.size() * static_cast<std::size_t>(value_dim)),
        output(static_cast<std::size_t>(value_dim)),
        weights(mask.size()) {
    const auto keys = static_cast<int64_t>(mask.size());
    span.key = {zeros.data(), 1, 0};
    span.value = {values.data(), value_dim, 0};
    span.length = sequence.kv_len = keys;
    sequence.q_len = 1;
    sequence.query = {zeros.data(), 1, 0};
    sequence.output = {output.data(), 0, 0};
    sequence.spans = &span;
    sequence.num_spans = 1;
    sequence.lse = &lse;
    sequence.weights = weights.data();
    args.num_heads = args.num_kv_heads = args.head_dim = 1;
    args.value_dim = value_dim;
    args.mask = {MaskType::kFloat32, mask.data(), 0, 0, 0, 1, keys};
    args.stage = kernels::ScoreStage::kProbabilities;
    args.sequences = &sequence;
    args.num_sequences = 1;
  }
  std::vector<float> mask;
  std::vector<float> zeros;
  std::vector<float> values;
  std::vector<float> output;
  std::vector<float> weights;
  float lse = 0;
  KeyValueSpan span;
  Sequence sequence;
  AttentionArgs args;
};

class StandardAttentionIsaTest : public testing::TestWithParam<const IsaKernels*> {};

TEST_P(StandardAttentionIsaTest, ExponentialIsAccurate) {
  std::vector<float> scores;
  for (int i = 0; i <= 8192; ++i) scores.push_back(-87.0f * static_cast<float>(i) / 8192.0f);
  MaskOnly problem(scores, 1);
  RunAllTasks(*GetParam(), problem.args);
  const double largest = problem.weights[0];
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const double expected = std::exp(static_cast<double>(scores[i]));
    // One rounding each of e^x and of two weights.
    if (problem.weights[i] > 1.2e-38f) {
      ASSERT_NEAR(problem.weights[i] / largest / expected, 1, 3.5e-7) << scores[i];
    }
  }
}

TEST_P(StandardAttentionIsaTest, SingleKeyConvertsEveryHalf) {
  constexpr int64_t kAll = 0x10000;
  std::vector<uint16_t> halves(kAll);
  for (int64_t i = 0; i < kAll; ++i) halves[static_cast<std::size_t>(i)] = static_cast<uint16_t>(i);
  for (const ElementType type : {ElementType::kFloat16, ElementType::kBFloat16}) {
    MaskOnly problem({0.0f}, kAll);
    problem.args.dtype = problem.args.kv_dtype = type;
    problem.span.value.data = halves.data();
    RunAllTasks(*GetParam(), problem.args);
    for (int64_t i = 0; i < kAll; ++i) {
      const double expected = ReadElement(type, halves.data(), i);
      const double actual = problem.output[static_cast<std::size_t>(i)];
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(actual)) << i;
      } else {
        ASSERT_EQ(actual, expected) << i;
      }
    }
  }
}

TEST_P(StandardAttentionIsaTest, ResultsAreRoundedToNearestEven) {
  // Every half, the middle between it and the next, and the float32 numbers around that.
  constexpr int64_t kCount = 4 * 0x8000;
  for (const ElementType type : {ElementType::kFloat16, ElementType::kBFloat16}) {
    MaskOnly problem({0.0f}, kCount);
    problem.args.output_dtype = type;
    for (uint32_t i = 0; i < 0x8000; ++i) {
      const uint16_t pair[] = {static_cast<uint16_t>(i), static_cast<uint16_t>(i + 1)};
      const double low = ReadElement(type, pair, 0);
      const double high = ReadElement(type, pair, 1);
      const auto middle = static_cast<float>((low + high) / 2);
      float* const values = problem.values.data() + i * 4;
      values[0] = static_cast<float>(low);
      values[1] = middle;
      values[2] = std::nextafter(middle, 0.0f);
      values[3] = std::nextafter(middle, kInfinity);
    }
    RunAllTasks(*GetParam(), problem.args);
    for (int64_t i = 0; i < kCount; ++i) {
      uint16_t expected = 0;
      const float value = problem.values[static_cast<std::size_t>(i)];
      // Arithmetic on subnormal float32 numbers is exact: bfloat16's come through too.
      WriteElement(value, type, &expected, 0);
      const double actual = ReadElement(type, problem.output.data(), i);
      if (std::isnan(value)) {
        ASSERT_TRUE(std::isnan(actual)) << i;
      } else {
        ASSERT_EQ(actual, ReadElement(type, &expected, 0)) << value;
      }
    }
  }
}

TEST_P(StandardAttentionIsaTest, RowThatSeesNothingIsZero) {
  MaskOnly problem(std::vector<float>(37, -kInfinity), 3);
  problem.values.assign(problem.values.size(), kNaN);
  problem.zeros.assign(problem.zeros.size(), kNaN);
  RunAllTasks(*GetParam(), problem.args);
  EXPECT_EQ(problem.output, std::vector<float>(3, 0.0f));
  EXPECT_EQ(problem.weights, std::vector<float>(37, 0.0f));
  EXPECT_EQ(problem.lse, -kInfinity);

  const float sink = 2.5f;
  problem.args.sink_logits = &sink;
  RunAllTasks(*GetParam(), problem.args);
  EXPECT_EQ(problem.output, std::vector<float>(3, 0.0f));
  EXPECT_EQ(problem.weights, std::vector<float>(37, 0.0f));
  EXPECT_EQ(problem.lse, sink);
}

TEST_P(StandardAttentionIsaTest, NaNOrInfinityInMaskStaysInItsRow) {
  for (const float special : {kNaN, kInfinity}) {
    ProblemCase c;
    c.heads = 2;
    c.q_len = 14;
    c.kv_len = 70;
    c.lse = true;
    c.mask = MaskType::kFloat32;
    c.mask_rank = 2;
    AttentionProblem problem(c);
    const kernels::Mask& mask = problem.args().mask;
    auto* const row = static_cast<float*>(const_cast<void*>(mask.data)) + 4 * mask.query_stride;
    row[69] = special;
    RunAllTasks(*GetParam(), problem.args());
    const auto expected = AttentionReference(problem.args());
    EXPECT_TRUE(ExpectAttentionClose(problem.args(), expected));
    const auto row_elements = static_cast<std::size_t>(c.heads * c.head_dim);
    EXPECT_TRUE(std::isnan(expected[0].output[4 * row_elements]));
    EXPECT_FALSE(std::isnan(expected[0].output[5 * row_elements]));
  }
}

TEST_P(StandardAttentionIsaTest, CancelledTaskWritesNothing) {
  for (const int64_t q_len : {1, 40}) {
    ProblemCase c;
    c.q_len = q_len;
    c.kv_len = 300;
    AttentionProblem problem(c);
    const bool cancelled = true;
    RunAllTasks(*GetParam(), problem.args(), &cancelled);
    const auto& output = problem.args().sequences[0].output;
    EXPECT_TRUE(std::isnan(ReadElement(ElementType::kFloat32, output.data, 0)));
  }
}

// What a task wrote of its score matrix: as many elements as are counted.
TEST_P(StandardAttentionIsaTest, FormsTheScoresThatAreCounted) {
  for (const int64_t q_len : {4, 30, 130}) {
    for (const int64_t window : {-1, 50}) {
      ProblemCase c;
      c.q_len = q_len;
      c.kv_len = 528;
      c.causal = true;
      c.window_left = window;
      c.first_query_position = 128;
      AttentionProblem problem(c);
      const AttentionArgs& args = problem.args();
      const kernels::TaskPlan plan = kernels::cpu::PlanStandardAttention(args);
      std::vector<uint32_t> memory(plan.task_workspace_bytes / sizeof(float) + 16, 0xffffffff);
      void* workspace = memory.data();
      std::size_t space = memory.size() * sizeof(float);
      ASSERT_NE(std::align(64, plan.task_workspace_bytes, workspace, space), nullptr);
      GetParam()->standard_attention(args, 0, workspace, nullptr);

      const auto parts = kernels::cpu::DivideStandardScratch(c.q_len, c.head_dim, c.head_dim);
      const auto* const scores = static_cast<const uint32_t*>(workspace) + parts.scores;
      const int64_t floats = q_len * kernels::cpu::StandardScoreStride(c.kv_len);
      const int64_t written = floats - std::count(scores, scores + floats, 0xffffffff);
      const kernels::cpu::StandardPairs pairs = kernels::cpu::CountStandardPairs(args);
      // Few rows' scores are those of their keys alone, in panels that softmax fills.
      EXPECT_GE(written, pairs.scored);
      EXPECT_LE(written, pairs.scored + (q_len < kernels::cpu::kStandardFewRows ? q_len * 30 : 0));
      EXPECT_LE(pairs.weighed, pairs.scored);
      EXPECT_LT(pairs.scored, c.q_len * c.kv_len / 2);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, StandardAttentionIsaTest, testing::ValuesIn(RunnableIsas()),
                         [](const auto& test) { return std::string(test.param->name); });

TEST(StandardAttention, CountsEveryPairThatItMultiplies) {
  ProblemCase c;
  c.q_len = 32;
  c.kv_len = 64;
  kernels::cpu::StandardPairs pairs = kernels::cpu::CountStandardPairs(AttentionProblem(c).args());
  EXPECT_EQ(pairs.scored, 32 * 64);
  EXPECT_EQ(pairs.weighed, 32 * 64);
  // Groups of 12, 12 and 8 rows, of which the last sees 44, 56 and 64 keys.
  c.causal = true;
  pairs = kernels::cpu::CountStandardPairs(AttentionProblem(c).args());
  EXPECT_EQ(pairs.scored, 12 * 48 + 12 * 64 + 8 * 64);
  EXPECT_EQ(pairs.weighed, 12 * 44 + 12 * 56 + 8 * 64);
  // Weights before masks are those of all keys.
  for (const auto& [stage, scored] : {std::pair(kernels::ScoreStage::kSoftCapped, 32 * 64),
                                      std::pair(kernels::ScoreStage::kMasked, 12 * 48 + 20 * 64)}) {
    c.stage = stage;
    EXPECT_EQ(kernels::cpu::CountStandardPairs(AttentionProblem(c).args()).scored, scored);
  }
  c.stage = kernels::ScoreStage::kNone;
  c.q_len = 4;
  c.kv_len = 37;
  pairs = kernels::cpu::CountStandardPairs(AttentionProblem(c).args());
  EXPECT_EQ(pairs.scored, 4 * 37);
}

TEST(StandardAttention, RunsTheActiveIsa) {
  ProblemCase c;
  c.q_len = 5;
  c.kv_len = 9;
  AttentionProblem problem(c);
  const kernels::TaskPlan plan = kernels::cpu::PlanStandardAttention(problem.args());
  EXPECT_EQ(plan.num_tasks, 1);
  EXPECT_EQ(plan.task_workspace_bytes,
            kernels::cpu::StandardAttentionTaskBytes(c.q_len, c.q_len * c.kv_len, c.head_dim,
                                                     problem.args().value_dim));
  std::vector<char> memory(plan.task_workspace_bytes + 64);
  void* workspace = memory.data();
  std::size_t space = memory.size();
  ASSERT_NE(std::align(64, plan.task_workspace_bytes, workspace, space), nullptr);
  kernels::cpu::RunStandardAttention(problem.args(), 0, workspace, nullptr);
  EXPECT_TRUE(ExpectAttentionClose(problem.args(), AttentionReference(problem.args())));
}

}  // namespace
}  // namespace attn::reference
