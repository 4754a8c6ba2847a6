// What a stated problem is turned into: addresses, strides, lengths, masks, outputs; and what is
// refused.
#include "core/attention_problem.h"

#include <gtest/gtest.h>

#include <limits>

#include "core/error.h"

namespace attn {
namespace {

constexpr std::int64_t kMaxTokens = 1 << 20;

// Tensors without data: only shapes matter until something is executed.
TensorView Shaped(std::initializer_list<std::int64_t> shape, DType dtype = DType::kFloat32) {
  static float storage[64];
  return TensorView(storage, dtype, shape);
}

AttendInputs Dense() {
  AttendInputs inputs;
  inputs.query = Shaped({2, 8, 5, 16});
  inputs.key = Shaped({2, 2, 7, 16});
  inputs.value = Shaped({2, 2, 7, 24});
  return inputs;
}

absl::Status StatusOf(const AttendInputs& inputs, const LayerSpec* layer = nullptr) {
  return AttentionProblem::Create(inputs, layer, kMaxTokens).status();
}

std::string FieldOf(const AttendInputs& inputs) {
  const absl::Status status = StatusOf(inputs);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  return ErrorDetailsOf(status)["field"];
}

TEST(AttentionProblemTest, DescribesADenseBatch) {
  const auto problem = AttentionProblem::Create(Dense(), nullptr, kMaxTokens);
  ASSERT_TRUE(problem.ok()) << problem.status();
  const kernels::AttentionArgs& args = problem->args();
  EXPECT_EQ(args.num_sequences, 2);
  EXPECT_EQ(args.num_kv_heads, 2);
  EXPECT_EQ(args.value_dim, 24);
  EXPECT_FLOAT_EQ(args.scale, 0.25f);
  EXPECT_EQ(args.sequences[1].first_query_position, 2);  // bottom right
  EXPECT_EQ(args.sequences[0].query.row_stride, 16);
  EXPECT_EQ(args.sequences[0].query.head_stride, 5 * 16);
  EXPECT_EQ(problem->outputs().output.shape, (std::vector<std::int64_t>{2, 8, 5, 24}));
  EXPECT_FALSE(problem->outputs().lse.defined());
  EXPECT_FALSE(problem->shape().ragged);
}

TEST(AttentionProblemTest, ReadsTokensFirstAndPackedLayouts) {
  AttendInputs inputs;
  inputs.layout = TensorLayout::kTokensFirst;
  inputs.query = Shaped({2, 5, 8, 16});
  inputs.key = inputs.value = Shaped({2, 5, 8, 16});
  auto problem = AttentionProblem::Create(inputs, nullptr, kMaxTokens);
  ASSERT_TRUE(problem.ok());
  EXPECT_EQ(problem->args().sequences[1].query.row_stride, 8 * 16);
  EXPECT_EQ(problem->args().sequences[1].query.head_stride, 16);

  inputs.layout = TensorLayout::kPacked;
  inputs.query = Shaped({6, 8, 16});
  inputs.key = inputs.value = Shaped({9, 8, 16});
  inputs.query_lengths = {2, 0, 4};
  inputs.kv_lengths = {3, 1, 5};
  inputs.output_lse = true;
  problem = AttentionProblem::Create(inputs, nullptr, kMaxTokens);
  ASSERT_TRUE(problem.ok()) << problem.status();
  const kernels::Sequence& last = problem->args().sequences[2];
  EXPECT_EQ(last.q_len, 4);
  EXPECT_EQ(
      static_cast<const float*>(last.query.data) - static_cast<const float*>(inputs.query.data),
      2 * 8 * 16);
  EXPECT_EQ(static_cast<const float*>(last.spans[0].key.data) -
                static_cast<const float*>(inputs.key.data),
            4 * 8 * 16);
  EXPECT_EQ(problem->outputs().lse.shape, (std::vector<std::int64_t>{6, 8}));
  inputs.kv_lengths = {3, 1, 4};
  EXPECT_EQ(FieldOf(inputs), "kv_lengths");
}

TEST(AttentionProblemTest, PutsThePastInFrontOfTheNewKeys) {
  AttendInputs inputs = Dense();
  inputs.past_key = Shaped({2, 2, 4, 16});
  inputs.past_value = Shaped({2, 2, 4, 24});
  inputs.output_present = true;
  const auto problem = AttentionProblem::Create(inputs, nullptr, kMaxTokens);
  ASSERT_TRUE(problem.ok()) << problem.status();
  const kernels::Sequence& row = problem->args().sequences[0];
  EXPECT_EQ(row.kv_len, 11);
  EXPECT_EQ(row.num_spans, 2);
  EXPECT_EQ(row.spans[0].length, 4);
  EXPECT_EQ(row.first_query_position, 6);
  EXPECT_EQ(problem->outputs().present_value.shape, (std::vector<std::int64_t>{2, 2, 11, 24}));
  inputs.past_value = Shaped({2, 2, 3, 24});
  EXPECT_EQ(FieldOf(inputs), "past_key_value.inline_kv.value");
}

TEST(AttentionProblemTest, BroadcastsMasksFromTheRight) {
  AttendInputs inputs = Dense();
  for (const auto& shape : std::vector<std::vector<std::int64_t>>{
           {5, 7}, {1, 7}, {8, 5, 7}, {2, 1, 5, 7}, {2, 8, 5, 7}, {1, 1, 1, 1}, {5, 1}, {5, 3}}) {
    inputs.attention_mask = TensorView(inputs.query.data, DType::kFloat32, shape.data(),
                                       static_cast<int>(shape.size()));
    EXPECT_TRUE(StatusOf(inputs).ok()) << ShapeText(inputs.attention_mask);
  }
  for (const auto& shape : std::vector<std::vector<std::int64_t>>{
           {7}, {5, 8}, {4, 7}, {3, 5, 7}, {1, 1, 1, 5, 7}, {5, 0}}) {
    inputs.attention_mask = TensorView(inputs.query.data, DType::kFloat32, shape.data(),
                                       static_cast<int>(shape.size()));
    EXPECT_EQ(FieldOf(inputs), "attention_mask") << ShapeText(inputs.attention_mask);
  }
  inputs.attention_mask = Shaped({5, 3});
  const auto problem = AttentionProblem::Create(inputs, nullptr, kMaxTokens);
  EXPECT_EQ(problem->args().mask.kv_extent, 3);  // the rest is hidden
}

TEST(AttentionProblemTest, BooleansAreZeroOrOne) {
  AttendInputs inputs = Dense();
  std::vector<std::uint8_t> mask(35, 1);
  inputs.attention_mask = TensorView(mask.data(), DType::kBool, {5, 7});
  EXPECT_TRUE(StatusOf(inputs).ok());
  mask[34] = 2;
  EXPECT_EQ(FieldOf(inputs), "attention_mask");
}

TEST(AttentionProblemTest, TasksWithoutTokensAreBoundedToo) {
  AttendInputs inputs;
  inputs.query = Shaped({65536, 65536, 0, 1});
  inputs.key = inputs.value = Shaped({65536, 1, 0, 1});
  EXPECT_EQ(FieldOf(inputs), "query");
}

TEST(AttentionProblemTest, CopiesAPaddingMaskAndChecksItsValues) {
  AttendInputs inputs = Dense();
  std::vector<std::int64_t> padding(14, 1);
  padding[13] = 0;
  inputs.attention_mask = TensorView(padding.data(), DType::kInt64, {2, 7});
  auto problem = AttentionProblem::Create(inputs, nullptr, kMaxTokens);
  ASSERT_TRUE(problem.ok()) << problem.status();
  padding[13] = 1;  // too late to matter
  const kernels::Mask& mask = problem->args().mask;
  EXPECT_EQ(static_cast<const std::uint8_t*>(mask.data)[13], 0);
  EXPECT_EQ(mask.batch_stride, 7);
  EXPECT_EQ(mask.query_stride, 0);
  padding[3] = 2;
  EXPECT_EQ(FieldOf(inputs), "attention_mask");
}

TEST(AttentionProblemTest, LengthsOfPaddedRows) {
  AttendInputs inputs = Dense();
  inputs.query_lengths = {5, 2};
  inputs.kv_lengths = {3, 0};
  inputs.stage = kernels::ScoreStage::kProbabilities;
  const auto problem = AttentionProblem::Create(inputs, nullptr, kMaxTokens);
  ASSERT_TRUE(problem.ok());
  EXPECT_TRUE(problem->shape().ragged);
  EXPECT_EQ(problem->args().sequences[1].kv_len, 0);
  EXPECT_EQ(problem->args().sequences[1].first_query_position, -2);
  EXPECT_EQ(problem->outputs().attention_weights.shape, (std::vector<std::int64_t>{2, 8, 5, 3}));
  inputs.query_lengths = {6, 1};
  EXPECT_EQ(FieldOf(inputs), "query_lengths");
  inputs.query_lengths = {-1, 1};
  EXPECT_EQ(FieldOf(inputs), "query_lengths");
}

TEST(AttentionProblemTest, RefusesWhatDoesNotFit) {
  AttendInputs inputs = Dense();
  inputs.key = Shaped({2, 3, 7, 16});
  EXPECT_EQ(FieldOf(inputs), "key");
  inputs = Dense();
  inputs.value = Shaped({2, 2, 6, 24});
  EXPECT_EQ(FieldOf(inputs), "value");
  inputs = Dense();
  inputs.query = Shaped({2, 8, 5, 16}, DType::kInt64);
  EXPECT_EQ(FieldOf(inputs), "query");
  inputs = Dense();
  inputs.query = Shaped({2, 8, 5, 0});
  EXPECT_EQ(FieldOf(inputs), "query");
  inputs = Dense();
  inputs.options.soft_cap = std::numeric_limits<double>::infinity();
  EXPECT_EQ(FieldOf(inputs), "options.soft_cap");
  inputs = Dense();
  inputs.options.alibi_slopes = std::vector<float>(7);
  EXPECT_EQ(FieldOf(inputs), "options.alibi_slopes");
  inputs = Dense();
  inputs.first_query_position = {std::numeric_limits<std::int64_t>::max(), 0};
  EXPECT_EQ(FieldOf(inputs), "first_query_position");
  inputs = Dense();
  inputs.query = Shaped({std::int64_t{1} << 40, 8, 0, 16});  // no bytes, and no list of that length
  inputs.key = inputs.value = Shaped({std::int64_t{1} << 40, 8, 0, 16});
  EXPECT_EQ(FieldOf(inputs), "query");
  inputs.query = Shaped({0, 8, std::int64_t{1} << 50, 16});
  inputs.key = inputs.value = Shaped({0, 8, 1, 16});
  EXPECT_EQ(FieldOf(inputs), "query");
}

TEST(AttentionProblemTest, ALayersValuesHoldWhereTheRequestSaysNothing) {
  LayerSpec layer;
  layer.num_heads = 8;
  layer.num_kv_heads = 2;
  layer.head_dim = 16;
  layer.value_dim = 24;
  layer.options.is_causal = true;
  layer.options.window_left = 3;
  AttendInputs inputs = Dense();
  inputs.options.window_left = -1;
  const auto problem = AttentionProblem::Create(inputs, &layer, kMaxTokens);
  ASSERT_TRUE(problem.ok());
  EXPECT_TRUE(problem->args().is_causal);
  EXPECT_EQ(problem->args().window_left, -1);
  layer.num_kv_heads = 4;
  EXPECT_EQ(StatusOf(inputs, &layer).code(), absl::StatusCode::kInvalidArgument);
}

TEST(AttentionProblemTest, EmptyBatchesAndLengthsAreProblemsToo) {
  AttendInputs inputs = Dense();
  inputs.query = Shaped({2, 8, 0, 16});
  EXPECT_TRUE(StatusOf(inputs).ok());
  inputs = Dense();
  inputs.key = Shaped({2, 2, 0, 16});
  inputs.value = Shaped({2, 2, 0, 24});
  EXPECT_TRUE(StatusOf(inputs).ok());
  inputs.query = Shaped({0, 8, 5, 16});
  inputs.key = Shaped({0, 2, 7, 16});
  inputs.value = Shaped({0, 2, 7, 24});
  EXPECT_TRUE(StatusOf(inputs).ok());
}

}  // namespace
}  // namespace attn
