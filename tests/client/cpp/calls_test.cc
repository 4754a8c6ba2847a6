#include "client/cpp/calls.h"

#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

namespace attn::client {
namespace {

namespace v1 = attention::v1;

template <typename Message>
std::string Text(const Message& message) {
  std::string text;
  google::protobuf::TextFormat::Printer printer;
  printer.SetSingleLineMode(true);
  printer.PrintToString(message, &text);
  return text;
}

template <typename Message>
std::string Parsed(const std::string& text) {
  Message message;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &message)) << text;
  return Text(message);
}

Tensor Bools(std::vector<bool> values) {
  return Tensor::FromBools({static_cast<int64_t>(values.size())}, values).value();
}

Tensor Ints(const std::vector<int64_t>& values) {
  return Tensor::FromInts({static_cast<int64_t>(values.size())}, values).value();
}

TEST(ToRequestTest, ForwardHasEveryField) {
  ForwardCall call;
  call.layer = {.index = 3, .stack = "decoder", .cross = true};
  call.hidden_states = Tensor::FromFloats({1, 1, 1}, {1}).value();
  call.encoder_hidden_states = Tensor::FromFloats({1, 1, 1}, {2}, kBfloat16).value();
  call.query_lengths = {1};
  call.kv_lengths = {2, 3};
  call.attention_mask = Bools({true, false});
  call.position_ids = Ints({-1});
  call.attention = {.scale = 0.5,
                    .is_causal = true,
                    .window_left = 4,
                    .window_right = -1,
                    .soft_cap = 30,
                    .alibi_slopes = {{0.25f, 0.5f}},
                    .sink_logits = std::vector<float>()};
  call.execution = {.implementation = "flash", .sparsity_factor = 0.5, .priority = 2};
  call.output_attentions = true;
  EXPECT_EQ(Text(ToRequest("m", std::move(call))), Parsed<v1::ForwardRequest>(R"(
    layer { model: "m" stack: "decoder" layer: 3 kind: ATTENTION_KIND_CROSS }
    hidden_states { dtype: DATA_TYPE_FLOAT32 shape: [1, 1, 1] data: "\000\000\200\077" }
    encoder_hidden_states { dtype: DATA_TYPE_BFLOAT16 shape: [1, 1, 1] data: "\000\100" }
    query_lengths: 1 kv_lengths: [2, 3]
    attention_mask { dtype: DATA_TYPE_BOOL shape: 2 data: "\001\000" }
    position_ids { dtype: DATA_TYPE_INT64 shape: 1 data: "\377\377\377\377\377\377\377\377" }
    options { scale: 0.5 is_causal: true window_left: 4 window_right: -1 soft_cap: 30
              alibi_slopes { values: [0.25, 0.5] } sink_logits {} }
    execution { implementation: "flash" sparsity { factor: 0.5 } priority: 2 }
    output_attentions: true)"));
}

TEST(ToRequestTest, AttendHasEveryField) {
  AttendCall call;
  call.tensor_layout = v1::TENSOR_LAYOUT_PACKED;
  call.query = Ints({1});
  call.key = Ints({2});
  call.value = Ints({3});
  call.query_lengths = {1};
  call.kv_lengths = {2};
  call.first_query_position = {-3};
  call.attention_mask = Bools({true});
  call.execution.sparsity_mass = 0.9;
  call.attention_stage = v1::SCORE_STAGE_MASKED;
  call.output_lse = true;
  call.output_dtype = kFloat16;
  const v1::AttendRequest request = ToRequest("", std::move(call));
  const auto integer = [](const std::string& byte) {
    return R"({ dtype: DATA_TYPE_INT64 shape: 1 data: "\00)" + byte +
           R"(\000\000\000\000\000\000\000" })";
  };
  EXPECT_EQ(Text(request), Parsed<v1::AttendRequest>(
                               "layer {} tensor_layout: TENSOR_LAYOUT_PACKED query " +
                               integer("1") + " key " + integer("2") + " value " + integer("3") +
                               R"(
    query_lengths: 1 kv_lengths: 2 first_query_position: -3
    attention_mask { dtype: DATA_TYPE_BOOL shape: 1 data: "\001" }
    options {} execution { sparsity { mass: 0.9 } }
    attention_stage: SCORE_STAGE_MASKED output_lse: true output_dtype: DATA_TYPE_FLOAT16)"));
}

TEST(ToRequestTest, WhatIsNotThereIsUnset) {
  const v1::AttendRequest attend = ToRequest("", AttendCall());
  EXPECT_FALSE(attend.has_query() || attend.has_key() || attend.has_attention_mask());
  EXPECT_EQ(Text(attend.options()), "");
  const v1::ForwardRequest forward = ToRequest("", ForwardCall());
  EXPECT_FALSE(forward.has_hidden_states() || forward.has_position_ids());
}

TEST(ToResultTest, HasWhatTheAnswerHas) {
  v1::AttendResponse response;
  *response.mutable_output() = ToProto(Ints({1, 2}));
  *response.mutable_lse() = ToProto(Ints({3}));
  response.add_cache_length(9);
  response.mutable_execution()->set_implementation("flash");
  const AttendResult result = ToResult(response);
  EXPECT_EQ(result.output.shape, std::vector<int64_t>({2}));
  EXPECT_EQ(result.output.bytes, response.output().data());
  EXPECT_EQ(result.lse.bytes, response.lse().data());
  EXPECT_EQ(result.attention_weights.dtype, v1::DATA_TYPE_UNSPECIFIED);
  EXPECT_EQ(result.cache_length, std::vector<int64_t>({9}));
  EXPECT_EQ(result.execution.implementation(), "flash");
}

TEST(TensorTest, FloatsSurviveEveryFloatingType) {
  const std::vector<float> values = {0, -1.5, 256, 0.0078125};
  for (const DataType dtype : {kFloat32, kFloat16, kBfloat16}) {
    const Tensor tensor = Tensor::FromFloats({2, 2}, values, dtype).value();
    EXPECT_EQ(tensor.bytes.size(), 4 * static_cast<size_t>(ElementSize(dtype)));
    EXPECT_EQ(tensor.ToFloats().value(), values);
    EXPECT_EQ(FromProto(ToProto(tensor)).ToFloats().value(), values);
  }
}

TEST(TensorTest, RefusesWhatDoesNotFit) {
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(Tensor::FromFloats({2, 2}, {1, 2, 3}).status().code(), kInvalid);
  EXPECT_EQ(Tensor::FromFloats({1}, {1}, v1::DATA_TYPE_INT64).status().code(), kInvalid);
  EXPECT_EQ(Tensor::FromFloats({-1}, {}).status().code(), kInvalid);
  EXPECT_EQ(Tensor::FromInts({2}, {1}).status().code(), kInvalid);
  EXPECT_EQ(Tensor::FromBools({2}, {true}).status().code(), kInvalid);
  EXPECT_EQ(Ints({1}).ToFloats().status().code(), kInvalid);
  Tensor cut = Tensor::FromFloats({2}, {1, 2}).value();
  cut.bytes.pop_back();
  EXPECT_EQ(cut.ToFloats().status().code(), kInvalid);
  EXPECT_TRUE(Tensor::FromFloats({0, 3}, {}).ok());
}

}  // namespace
}  // namespace attn::client
