// The yardstick itself: numbers worked out by hand, and a comparison that tells right from wrong.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "tests/reference/attention_reference.h"
#include "tests/reference/expect_close.h"
#include "tests/reference/problem_builder.h"

namespace attn::reference {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::KeyValueSpan;
using kernels::ScoreStage;
using kernels::Sequence;

// Two keys, one query, head_dim 1: scores 0.5 * 2 * (1, 3) = 1, 3.
struct TwoKeys {
  TwoKeys() {
    span.key = {keys, 1, 0};
    span.value = {values, 1, 0};
    span.length = 2;
    sequence.q_len = 1;
    sequence.kv_len = 2;
    sequence.first_query_position = 1;
    sequence.query = {&query, 1, 0};
    sequence.output = {&output, 1, 0};
    sequence.spans = &span;
    sequence.num_spans = 1;
    args.num_heads = args.num_kv_heads = args.head_dim = args.value_dim = 1;
    args.scale = 0.5f;
    args.sequences = &sequence;
    args.num_sequences = 1;
  }
  float query = 2;
  float keys[2] = {1, 3};
  float values[2] = {10, 20};
  float output = 0;
  KeyValueSpan span;
  Sequence sequence;
  AttentionArgs args;
};

TEST(AttentionReference, WeighsValues) {
  TwoKeys two;
  const ReferenceResult result = AttentionReference(two.args)[0];
  const double p = 1 / (1 + std::exp(-2.0));
  EXPECT_NEAR(result.output[0], 10 * (1 - p) + 20 * p, 1e-12);
  EXPECT_NEAR(result.lse[0], std::log(std::exp(1.0) + std::exp(3.0)), 1e-12);
}

TEST(AttentionReference, AppliesOptionsInOrder) {
  TwoKeys two;
  const float slope = 0.25f;
  const float sink = 0.5f;
  two.args.alibi_slopes = &slope;
  two.args.sink_logits = &sink;
  two.args.soft_cap = 2;
  two.args.stage = ScoreStage::kMasked;
  const ReferenceResult result = AttentionReference(two.args)[0];
  const double first = 2 * std::tanh(0.5) - 0.25;
  const double second = 2 * std::tanh(1.5);
  EXPECT_NEAR(result.weights[0], first, 1e-12);
  EXPECT_NEAR(result.weights[1], second, 1e-12);
  const double sum = std::exp(first) + std::exp(second) + std::exp(0.5);
  EXPECT_NEAR(result.lse[0], std::log(sum), 1e-12);
  EXPECT_NEAR(result.output[0], (10 * std::exp(first) + 20 * std::exp(second)) / sum, 1e-12);
}

TEST(AttentionReference, HidesKeysByPosition) {
  TwoKeys two;
  two.args.is_causal = true;
  two.sequence.first_query_position = 0;
  EXPECT_EQ(AttentionReference(two.args)[0].output[0], 10);
  two.sequence.first_query_position = -1;
  const ReferenceResult nothing = AttentionReference(two.args)[0];
  EXPECT_EQ(nothing.output[0], 0);
  EXPECT_EQ(nothing.lse[0], -std::numeric_limits<double>::infinity());
  two.args.is_causal = false;
  two.args.window_left = 0;
  two.sequence.first_query_position = 1;
  EXPECT_EQ(AttentionReference(two.args)[0].output[0], 20);
}

TEST(AttentionReference, RoundsToNearestEven) {
  uint16_t bits = 0;
  const auto encode = [&bits](double value, ElementType type) {
    WriteElement(value, type, &bits, 0);
    return bits;
  };
  EXPECT_EQ(encode(1.0, ElementType::kFloat16), 0x3c00);
  EXPECT_EQ(encode(1.0 + 0x1p-11, ElementType::kFloat16), 0x3c00);
  EXPECT_EQ(encode(1.0 + 0x3p-11, ElementType::kFloat16), 0x3c02);
  EXPECT_EQ(encode(0x1p-24, ElementType::kFloat16), 0x0001);
  EXPECT_EQ(encode(0x1p-25, ElementType::kFloat16), 0x0000);
  EXPECT_EQ(encode(65519, ElementType::kFloat16), 0x7bff);
  EXPECT_EQ(encode(65520, ElementType::kFloat16), 0x7c00);
  EXPECT_EQ(encode(-2.0, ElementType::kBFloat16), 0xc000);
  EXPECT_EQ(encode(1.0 + 0x3p-8, ElementType::kBFloat16), 0x3f82);
}

TEST(AttentionReference, ReadsEveryHalfThatItWrites) {
  for (const ElementType type : {ElementType::kFloat16, ElementType::kBFloat16}) {
    for (uint32_t i = 0; i < 0x10000; ++i) {
      const auto bits = static_cast<uint16_t>(i);
      const double value = ReadElement(type, &bits, 0);
      if (std::isnan(value)) continue;
      uint16_t back = 0;
      WriteElement(value, type, &back, 0);
      ASSERT_EQ(back, bits);
    }
  }
}

TEST(ExpectAttentionClose, TellsRightFromWrong) {
  TwoKeys two;
  const auto expected = AttentionReference(two.args);
  const auto right = static_cast<float>(expected[0].output[0]);
  two.output = right;
  EXPECT_TRUE(ExpectAttentionClose(two.args, expected));
  two.output = right * 1.0001f;
  EXPECT_FALSE(ExpectAttentionClose(two.args, expected));
  two.output = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(ExpectAttentionClose(two.args, expected));
  two.output = std::numeric_limits<float>::infinity();
  EXPECT_FALSE(ExpectAttentionClose(two.args, expected));
}

TEST(ExpectAttentionClose, NamesTheWorstElement) {
  TwoKeys two;
  const auto expected = AttentionReference(two.args);
  two.output = 7;
  const std::string message = ExpectAttentionClose(two.args, expected).message();
  EXPECT_NE(message.find("output[sequence 0][row, head, column 0, 0, 0] is 7"), std::string::npos)
      << message;
}

TEST(AttentionProblem, SameSeedSameProblem) {
  ProblemCase c;
  c.q_len = 3;
  c.kv_len = 5;
  c.ragged = true;
  c.batch = 3;
  const AttentionProblem one(c);
  const AttentionProblem two(c);
  c.seed = 2;
  const AttentionProblem other(c);
  const auto output = [](const AttentionProblem& problem) {
    return AttentionReference(problem.args())[0].output;
  };
  EXPECT_EQ(output(one), output(two));
  EXPECT_NE(output(one), output(other));
}

TEST(AttentionProblem, FindsWhatIsWrittenBesideTheOutput) {
  ProblemCase c;
  c.heads = 2;
  AttentionProblem problem(c);
  const auto& output = problem.args().sequences[0].output;
  auto* const row = static_cast<float*>(output.data);
  for (int64_t i = 0; i < c.head_dim; ++i) row[i] = 0;
  EXPECT_TRUE(problem.NothingElseWritten());
  row[c.head_dim] = 0;
  EXPECT_FALSE(problem.NothingElseWritten());
}

TEST(CaseName, ReadsWell) {
  ProblemCase c;
  c.batch = 2;
  c.heads = 8;
  c.kv_heads = 2;
  c.q_len = 37;
  c.kv_len = 129;
  c.head_dim = 80;
  c.causal = true;
  EXPECT_EQ(CaseName(c), "b2_h8_kv2_q37_k129_d80_causal");
}

}  // namespace
}  // namespace attn::reference
