// Whisper: two stacks of one directory, cross-attention among them, and what it may not say.
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/hosted_model.h"
#include "tests/core/tiny_models.h"

namespace attn {
namespace {

using nlohmann::json;
using namespace attn::testing;  // NOLINT: fixtures of this folder

// Hidden size 8; an encoder of one layer with four heads, a decoder of two with two.
json TinyConfig() {
  return {{"model_type", "whisper"},      {"d_model", 8},
          {"encoder_layers", 1},          {"decoder_layers", 2},
          {"encoder_attention_heads", 4}, {"decoder_attention_heads", 2},
          {"max_source_positions", 30},   {"max_target_positions", 20},
          {"is_encoder_decoder", true},   {"num_hidden_layers", 1}};
}

void AddAttention(const std::string& start, float first, std::vector<TestTensor>& tensors) {
  for (const std::string name : {"q_proj", "k_proj", "v_proj", "out_proj"}) {
    tensors.push_back(FloatTensor(start + name + ".weight", {8, 8}, first));
    if (name != "k_proj") tensors.push_back(FloatTensor(start + name + ".bias", {8}, first + 5.0f));
    first += 100.0f;
  }
}

std::vector<TestTensor> TinyWeights(const std::string& prefix = "model.") {
  std::vector<TestTensor> tensors;
  AddAttention(prefix + "encoder.layers.0.self_attn.", 1000.0f, tensors);
  for (int layer = 0; layer < 2; ++layer) {
    const std::string start = prefix + "decoder.layers." + std::to_string(layer);
    const float first = 2000.0f * static_cast<float>(layer + 1);
    AddAttention(start + ".self_attn.", first, tensors);
    AddAttention(start + ".encoder_attn.", first + 1000.0f, tensors);
  }
  return tensors;
}

std::vector<float> Floats(const Parameter& parameter) {
  EXPECT_EQ(parameter.dtype, DType::kFloat32);
  std::vector<float> values(static_cast<std::size_t>(parameter.num_elements()));
  std::memcpy(values.data(), parameter.data.get(), parameter.bytes());
  return values;
}

class WhisperFamilyTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::shared_ptr<const HostedModel>> Create(const json& config,
                                                            const std::vector<TestTensor>& tensors,
                                                            ModelSpec spec = {}) {
    const std::string directory = root_ / "m";
    std::filesystem::create_directories(directory);
    WriteModel(directory, config, tensors);
    spec.weights = "m";
    return HostedModel::Create(spec, {.model_root = root_.path(), .run_slice = {}});
  }
  void ExpectRefused(const json& changes, absl::StatusCode code, const std::string& field) {
    json config = TinyConfig();
    config.update(changes);
    const absl::Status status = Create(config, TinyWeights()).status();
    EXPECT_EQ(status.code(), code) << config << status;
    EXPECT_EQ(ErrorDetailsOf(status)["field"], field) << status;
  }

 private:
  TemporaryDirectory root_;
};

TEST_F(WhisperFamilyTest, StacksAndTheirLayers) {
  for (const std::string prefix : {"model.", ""}) {
    const auto model = Create(TinyConfig(), TinyWeights(prefix));
    ASSERT_TRUE(model.ok()) << model.status();
    const ModelSpec& spec = (*model)->spec();
    EXPECT_EQ(spec.modality, Modality::kMultimodal);
    ASSERT_EQ(spec.stacks.size(), 2u);
    EXPECT_EQ(spec.stacks[0].name, "encoder");
    EXPECT_EQ(spec.stacks[0].max_positions, 30u);
    EXPECT_TRUE(spec.stacks[0].cross_attention.empty());
    EXPECT_EQ(spec.stacks[1].name, "decoder");
    EXPECT_EQ(spec.stacks[1].max_positions, 20u);

    const auto encoder = (*model)->Find({"", "encoder", 0, AttentionKind::kSelf});
    ASSERT_TRUE(encoder.ok());
    EXPECT_EQ((*encoder)->spec->num_heads, 4u);
    EXPECT_EQ((*encoder)->spec->head_dim, 2u);
    EXPECT_FALSE(*(*encoder)->spec->options.is_causal);
    const auto decoder = (*model)->Find({"", "decoder", 1, AttentionKind::kSelf});
    ASSERT_TRUE(decoder.ok());
    EXPECT_EQ((*decoder)->spec->num_heads, 2u);
    EXPECT_TRUE(*(*decoder)->spec->options.is_causal);
    EXPECT_EQ((*model)->Find({"", "encoder", 0, AttentionKind::kCross}).status().code(),
              absl::StatusCode::kNotFound);
    EXPECT_EQ((*model)->Find({"", "", 0, AttentionKind::kSelf}).status().code(),
              absl::StatusCode::kNotFound);
  }
}

TEST_F(WhisperFamilyTest, CrossAttentionHasItsQueryApartFromKeyAndValue) {
  const auto model = Create(TinyConfig(), TinyWeights());
  ASSERT_TRUE(model.ok()) << model.status();
  const auto found = (*model)->Find({"", "decoder", 1, AttentionKind::kCross});
  ASSERT_TRUE(found.ok());
  const HostedLayer& layer = **found;
  EXPECT_EQ(layer.kind, AttentionKind::kCross);
  EXPECT_EQ(layer.spec->encoder_hidden_size, 8u);
  EXPECT_FALSE(*layer.spec->options.is_causal);
  const LayerWeights& weights = *layer.weights;
  EXPECT_EQ(weights.query_key_value.weight.shape, (std::vector<std::int64_t>{8, 8}));
  EXPECT_EQ(weights.key_value.weight.shape, (std::vector<std::int64_t>{16, 8}));
  EXPECT_EQ(Floats(weights.query_key_value.weight).front(), 5000.0f);
  EXPECT_EQ(Floats(weights.query_key_value.bias).front(), 5005.0f);
  EXPECT_EQ(Floats(weights.key_value.weight)[0], 5100.0f);
  EXPECT_EQ(Floats(weights.key_value.weight)[64], 5200.0f);
  EXPECT_EQ(Floats(weights.key_value.bias)[0], 0.0f);  // keys have none
  EXPECT_EQ(Floats(weights.key_value.bias)[8], 5205.0f);
  EXPECT_EQ(Floats(weights.output.weight).front(), 5300.0f);

  std::size_t bytes = 0;
  for (const HostedLayer* each : (*model)->Layers()) bytes += each->weights->bytes();
  EXPECT_EQ((*model)->weight_bytes(), bytes);
  // Five layers: four matrices, and biases of the query, key with value, and the output.
  EXPECT_EQ(bytes, 5u * (4 * 64 + 4 * 8) * sizeof(float));
}

TEST_F(WhisperFamilyTest, AMissingTensorIsNamed) {
  for (const std::string name : {"k_proj.weight", "v_proj.bias"}) {
    const std::string missing = "model.decoder.layers.1.encoder_attn." + name;
    std::vector<TestTensor> tensors = TinyWeights();
    std::erase_if(tensors, [&](const TestTensor& tensor) { return tensor.name == missing; });
    const absl::Status status = Create(TinyConfig(), tensors).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_EQ(ErrorDetailsOf(status)["tensor"], missing);
  }
  std::vector<TestTensor> tensors = TinyWeights();
  const std::string surplus = "model.decoder.layers.0.encoder_attn.k_proj.bias";
  tensors.push_back(FloatTensor(surplus, {8}));
  EXPECT_EQ(ErrorDetailsOf(Create(TinyConfig(), tensors).status())["tensor"], surplus);
}

TEST_F(WhisperFamilyTest, WhatAConfigMayNotSay) {
  ExpectRefused({{"d_model", nullptr}}, absl::StatusCode::kInvalidArgument, "d_model");
  ExpectRefused({{"decoder_attention_heads", 3}}, absl::StatusCode::kInvalidArgument, "d_model");
  ExpectRefused({{"max_source_positions", 0}}, absl::StatusCode::kInvalidArgument,
                "max_source_positions");
  ExpectRefused({{"is_encoder_decoder", false}}, absl::StatusCode::kUnimplemented,
                "is_encoder_decoder");
  ExpectRefused({{"sliding_window", 4}}, absl::StatusCode::kUnimplemented, "sliding_window");
}

TEST_F(WhisperFamilyTest, ASpecAgreesWithTheDirectory) {
  ModelSpec spec;
  spec.stacks.resize(2);
  spec.stacks[1].cross_attention = {{.repeat = 2,
                                     .num_heads = 2,
                                     .head_dim = 4,
                                     .options = {},
                                     .rotary = {},
                                     .encoder_hidden_size = 8}};
  EXPECT_TRUE(Create(TinyConfig(), TinyWeights(), spec).ok());
  spec.stacks[1].cross_attention[0].encoder_hidden_size = 16;
  const absl::Status status = Create(TinyConfig(), TinyWeights(), spec).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ErrorDetailsOf(status)["field"], "stacks[1].cross_attention[0].encoder_hidden_size");
}

TEST(CrossAttentionSpec, AnEncoderIsAsWideAsTheStackUnlessItSays) {
  ModelSpec spec;
  spec.stacks.resize(1);
  LayerStack& stack = spec.stacks.front();
  stack.hidden_size = 24;
  LayerSpec layer;
  layer.num_heads = 2;
  layer.head_dim = 4;
  stack.cross_attention = {layer, layer};
  stack.cross_attention[1].encoder_hidden_size = 40;
  const auto model = HostedModel::Create(spec, {});
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ((*model)->spec().stacks[0].cross_attention[0].encoder_hidden_size, 24u);
  EXPECT_EQ((*model)->spec().stacks[0].cross_attention[1].encoder_hidden_size, 40u);
  stack.cross_attention[1].encoder_hidden_size = 1u << 30;
  EXPECT_EQ(ErrorDetailsOf(HostedModel::Create(spec, {}).status())["field"],
            "spec.stacks[0].cross_attention[1].encoder_hidden_size");
}

}  // namespace
}  // namespace attn
