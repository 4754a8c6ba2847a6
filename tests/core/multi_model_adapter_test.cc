// One interface for language, vision and multimodal: which layers work on what, what follows from
// it, and that its results are those of the modules and kernels behind it.
#include "core/multi_model_adapter.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <thread>

#include "core/error.h"
#include "tests/core/core_fixture.h"
#include "tests/core/tiny_models.h"

namespace attn {
namespace {

using testing::TinyDecoderConfig;
using testing::TinyDecoderTensors;

constexpr std::int64_t kTokens = 5;

const float* Floats(const AdapterTensor& tensor) {
  return static_cast<const float*>(tensor.view.data);
}

std::vector<float> Values(const AdapterTensor& tensor) {
  return {Floats(tensor), Floats(tensor) + tensor.view.num_elements()};
}

// Hidden states [1, kTokens, hidden_size], small enough for a softmax that is not all in one place.
struct Hidden {
  explicit Hidden(std::int64_t hidden_size) : size(hidden_size) {
    for (std::int64_t i = 0; i < kTokens * size; ++i) {
      values.push_back(0.01f * static_cast<float>((7 * i) % 11 - 5));
    }
  }
  ForwardInputs inputs() const {
    ForwardInputs result;
    result.hidden_states = TensorView(values.data(), DType::kFloat32, {1, kTokens, size});
    return result;
  }
  // The same with another last token.
  Hidden Changed() const {
    Hidden other = *this;
    for (std::int64_t i = 0; i < size; ++i) other.values[other.values.size() - 1 - i] += 0.5f;
    return other;
  }
  std::int64_t size;
  std::vector<float> values;
};

LayerSpec Layer(std::uint32_t repeat = 1) {
  LayerSpec layer;
  layer.repeat = repeat;
  layer.num_heads = 2;
  layer.num_kv_heads = 1;
  layer.head_dim = 4;
  layer.value_dim = 3;
  return layer;
}

// Two towers and a decoder that looks at the second one.
ModelSpec TowersSpec() {
  ModelSpec spec;
  spec.name = "towers";
  spec.modality = Modality::kMultimodal;
  LayerStack text;
  text.name = "text";
  text.modality = Modality::kLanguage;
  text.self_attention = {Layer(2)};
  text.cross_attention = {Layer(2)};
  LayerStack vision;
  vision.name = "vision";
  vision.modality = Modality::kVision;
  vision.self_attention = {Layer(3)};
  LayerStack joint;
  joint.name = "joint";
  joint.self_attention = {Layer()};
  spec.stacks = {text, vision, joint};
  return spec;
}

// Queries, keys and values with some score for every pair.
struct Tensors {
  explicit Tensors(std::int64_t kv_len) : keys(kv_len) {
    for (std::int64_t i = 0; i < 2 * kTokens * 4; ++i) {
      query.push_back(0.1f * static_cast<float>(i % 7));
    }
    for (std::int64_t i = 0; i < keys * 4; ++i) key.push_back(0.1f * static_cast<float>(i % 5));
    for (std::int64_t i = 0; i < keys * 3; ++i) value.push_back(static_cast<float>(i % 13));
  }
  AttendInputs inputs() const {
    AttendInputs result;
    result.query = TensorView(query.data(), DType::kFloat32, {1, 2, kTokens, 4});
    result.key = TensorView(key.data(), DType::kFloat32, {1, 1, keys, 4});
    result.value = TensorView(value.data(), DType::kFloat32, {1, 1, keys, 3});
    return result;
  }
  // Whether the first query sees the first key alone.
  bool FirstSeesOne(const AdapterTensor& output) const {
    return std::equal(value.begin(), value.begin() + 3, Floats(output));
  }
  std::int64_t keys;
  std::vector<float> query, key, value;
};

class AdapterTest : public ::testing::Test {
 protected:
  std::unique_ptr<MultiModelAttentionAdapter> Make(const ModelSpec& spec) {
    AdapterConfig config;
    config.threads = 2;
    config.factory.model_root = directory_.path();
    auto made = MultiModelAttentionAdapter::Create(config, spec);
    EXPECT_TRUE(made.ok()) << made.status();
    return made.ok() ? *std::move(made) : nullptr;
  }

  // The tiny model of that type, from a directory.
  std::unique_ptr<MultiModelAttentionAdapter> Load(const std::string& model_type,
                                                   const std::string& implementation = "") {
    std::filesystem::create_directory(directory_ / model_type);
    if (model_type == "vit") {
      testing::WriteModel(directory_ / model_type, testing::TinyVitConfig(),
                          testing::TinyTensors(testing::OldVitNames()));
    } else {
      const auto config = TinyDecoderConfig(model_type);
      testing::WriteModel(directory_ / model_type, config, TinyDecoderTensors(config));
    }
    ModelSpec spec;
    spec.name = model_type;
    spec.weights = model_type;
    spec.implementation = implementation;
    return Make(spec);
  }

  testing::TemporaryDirectory directory_;
};

TEST_F(AdapterTest, LanguageIsCausalAndItsResultsAreTheModules) {
  const auto adapter = Load("llama", "flash");
  ASSERT_NE(adapter, nullptr);
  const std::vector<LayerRef> layers = adapter->Layers(Modality::kLanguage);
  ASSERT_EQ(layers.size(), 2u);
  EXPECT_TRUE(adapter->Layers(Modality::kVision).empty());
  EXPECT_TRUE(adapter->Layers(Modality::kMultimodal).empty());
  const Hidden hidden(8);
  for (const LayerRef& layer : layers) {
    const auto result = adapter->Forward(layer, hidden.inputs());
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->implementation, "flash");
    const std::vector<float> output = Values(result->output);
    ASSERT_EQ(output.size(), hidden.values.size());

    const std::vector<float> later =
        Values(adapter->Forward(layer, hidden.Changed().inputs()).value().output);
    const auto last = static_cast<std::ptrdiff_t>(output.size() - 8);
    for (std::ptrdiff_t i = 0; i < last; ++i) {
      EXPECT_NEAR(output[static_cast<std::size_t>(i)], later[static_cast<std::size_t>(i)],
                  1e-5f * std::abs(output[static_cast<std::size_t>(i)]));
    }
    EXPECT_NE(output, later);

    const auto module = adapter->Module(layer);
    ASSERT_TRUE(module.ok()) << module.status();
    std::vector<float> again(output.size());
    TestDevice test;
    test.Execute([&](ExecutionContext& context) {
      ForwardOutputs outputs;
      outputs.output = MutableTensorView(again.data(), DType::kFloat32, {1, kTokens, 8});
      const absl::Status status = (*module)->Forward(hidden.inputs(), outputs, context);
      ASSERT_TRUE(status.ok()) << status;
    });
    EXPECT_EQ(output, again);
  }
}

TEST_F(AdapterTest, AModuleOutlivesItsAdapter) {
  auto adapter = Load("llama");
  ASSERT_NE(adapter, nullptr);
  const auto module = adapter->Module(adapter->Layers(Modality::kLanguage)[1]);
  ASSERT_TRUE(module.ok()) << module.status();
  adapter.reset();
  const Hidden hidden(8);
  EXPECT_TRUE((*module)->Plan(hidden.inputs()).ok());
}

TEST_F(AdapterTest, VisionIsBidirectionalAndHasNoPast) {
  const auto adapter = Load("vit");
  ASSERT_NE(adapter, nullptr);
  const std::vector<LayerRef> layers = adapter->Layers(Modality::kVision);
  ASSERT_EQ(layers.size(), 2u);
  const Hidden hidden(4);
  const auto output = adapter->Forward(layers[0], hidden.inputs());
  ASSERT_TRUE(output.ok()) << output.status();
  const auto changed = adapter->Forward(layers[0], hidden.Changed().inputs());
  ASSERT_TRUE(changed.ok()) << changed.status();
  EXPECT_NE(Floats(output->output)[0], Floats(changed->output)[0]);  // the first sees the last

  ForwardInputs inputs = hidden.inputs();
  inputs.use_cache = true;
  const absl::Status refused = adapter->Forward(layers[0], inputs).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ErrorDetailsOf(refused).at("field"), "use_cache");
}

TEST_F(AdapterTest, ACarriedPastContinuesALanguageLayer) {
  const auto adapter = Load("llama");
  ASSERT_NE(adapter, nullptr);
  const LayerRef layer = adapter->Layers(Modality::kLanguage)[0];
  const Hidden hidden(8);
  const std::vector<float> whole = Values(adapter->Forward(layer, hidden.inputs()).value().output);
  ForwardInputs inputs = hidden.inputs();
  inputs.hidden_states = TensorView(hidden.values.data(), DType::kFloat32, {1, 3, 8});
  inputs.use_cache = true;
  const auto first = adapter->Forward(layer, inputs);
  ASSERT_TRUE(first.ok()) << first.status();
  inputs.hidden_states = TensorView(hidden.values.data() + 24, DType::kFloat32, {1, 2, 8});
  inputs.past_key = first->present_key.view;
  inputs.past_value = first->present_value.view;
  const auto second = adapter->Forward(layer, inputs);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->present_key.view.extent(2), kTokens);
  float largest = 0.0f;
  for (const float value : whole) largest = std::max(largest, std::abs(value));
  for (std::size_t i = 0; i < 16; ++i) {
    EXPECT_NEAR(Floats(second->output)[i], whole[24 + i], 1e-5f * largest);
  }
}

TEST_F(AdapterTest, LayersAreFoundByWhatTheyWorkOn) {
  const auto adapter = Make(TowersSpec());
  ASSERT_NE(adapter, nullptr);
  const auto names = [&](Modality modality) {
    std::string all;
    for (const LayerRef& ref : adapter->Layers(modality)) {
      all += ref.stack + (ref.kind == AttentionKind::kCross ? "*" : "") +
             std::to_string(ref.layer) + " ";
    }
    return all;
  };
  EXPECT_EQ(names(Modality::kLanguage), "text0 text1 ");
  EXPECT_EQ(names(Modality::kVision), "vision0 vision1 vision2 ");
  EXPECT_EQ(names(Modality::kMultimodal), "text*0 text*1 joint0 ");  // the model's own, for joint
  EXPECT_EQ(names(Modality::kUnspecified), "");
}

TEST_F(AdapterTest, WhatAModalityImpliesGivesWayToWhatIsSaid) {
  ModelSpec spec = TowersSpec();
  spec.stacks[0].self_attention.push_back(Layer());
  spec.stacks[0].self_attention[1].options.is_causal = false;
  const auto adapter = Make(spec);
  ASSERT_NE(adapter, nullptr);
  const Tensors tensors(kTokens);
  const auto first_sees_one = [&](const LayerRef& ref, std::optional<bool> asked = {}) {
    AttendInputs inputs = tensors.inputs();
    inputs.options.is_causal = asked;
    const auto result = adapter->Attend(ref, inputs);
    EXPECT_TRUE(result.ok()) << result.status();
    return result.ok() && tensors.FirstSeesOne(result->output);
  };
  EXPECT_TRUE(first_sees_one({"", "text", 0, AttentionKind::kSelf}));
  EXPECT_TRUE(first_sees_one({"", "text", 1, AttentionKind::kSelf}));
  EXPECT_FALSE(first_sees_one({"", "text", 2, AttentionKind::kSelf}));  // by its spec
  EXPECT_FALSE(first_sees_one({"", "text", 0, AttentionKind::kSelf}, false));
  EXPECT_FALSE(first_sees_one({"", "text", 0, AttentionKind::kCross}));
  EXPECT_FALSE(first_sees_one({"", "vision", 2, AttentionKind::kSelf}));
  EXPECT_TRUE(first_sees_one({"", "vision", 2, AttentionKind::kSelf}, true));
  EXPECT_FALSE(first_sees_one({"", "joint", 0, AttentionKind::kSelf}));
}

TEST_F(AdapterTest, CrossAttentionSeesAllOfTheEncodersRows) {
  const auto adapter = Make(TowersSpec());
  ASSERT_NE(adapter, nullptr);
  Tensors tensors(70);
  std::fill(tensors.key.begin(), tensors.key.end(), 0.0f);  // all keys alike: the values' mean
  const auto result = adapter->Attend(adapter->Layers(Modality::kMultimodal)[0], tensors.inputs());
  ASSERT_TRUE(result.ok()) << result.status();
  for (std::size_t j = 0; j < 3; ++j) {
    float mean = 0.0f;
    for (std::size_t i = 0; i < 70; ++i) mean += tensors.value[3 * i + j] / 70.0f;
    for (std::size_t row = 0; row < 2 * kTokens; ++row) {
      EXPECT_NEAR(Floats(result->output)[3 * row + j], mean, 1e-4f);
    }
  }
}

TEST_F(AdapterTest, TheModelsImplementationGivesWayWhereItCanNot) {
  ModelSpec spec = TowersSpec();
  spec.implementation = "flash";
  const auto adapter = Make(spec);
  ASSERT_NE(adapter, nullptr);
  const LayerRef layer = adapter->Layers(Modality::kLanguage)[0];
  const Tensors tensors(kTokens);
  AttendInputs inputs = tensors.inputs();
  EXPECT_EQ(adapter->Attend(layer, inputs)->implementation, "flash");
  inputs.stage = kernels::ScoreStage::kProbabilities;
  const auto result = adapter->Attend(layer, inputs);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_NE(result->implementation, "flash");
  EXPECT_FALSE(result->reason.empty());
  EXPECT_FLOAT_EQ(Floats(result->attention_weights)[0], 1.0f);
}

TEST_F(AdapterTest, ThreadsMayShareIt) {
  const auto adapter = Load("llama");
  ASSERT_NE(adapter, nullptr);
  const LayerRef layer = adapter->Layers(Modality::kLanguage)[0];
  const Hidden hidden(8);
  const std::vector<float> expected =
      Values(adapter->Forward(layer, hidden.inputs()).value().output);
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int thread = 0; thread < 3; ++thread) {
    threads.emplace_back([&] {
      for (int i = 0; i < 20; ++i) {
        const auto result = adapter->Forward(layer, hidden.inputs());
        if (!result.ok() || Values(result->output) != expected) wrong.fetch_add(1);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST_F(AdapterTest, RefusesByName) {
  const auto adapter = Make(TowersSpec());
  ASSERT_NE(adapter, nullptr);
  const Hidden hidden(8);
  const auto code = [&](const LayerRef& ref) {
    return adapter->Forward(ref, hidden.inputs()).status().code();
  };
  EXPECT_EQ(code({"", "audio", 0, AttentionKind::kSelf}), absl::StatusCode::kNotFound);
  EXPECT_EQ(code({"", "text", 2, AttentionKind::kCross}), absl::StatusCode::kNotFound);
  EXPECT_EQ(code({"", "text", 0, AttentionKind::kSelf}), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(adapter->Module({"", "text", 0, AttentionKind::kSelf}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  ModelSpec spec = TowersSpec();
  spec.implementation = "no_such";
  EXPECT_EQ(MultiModelAttentionAdapter::Create({}, spec).status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace attn
