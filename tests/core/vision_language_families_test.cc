// Families with a text part, a vision part, or both: what a config makes of each stack, and what it
// may not say.
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
using Tensors = std::vector<TestTensor>;

std::vector<float> Floats(const Parameter& parameter) {
  EXPECT_EQ(parameter.dtype, DType::kFloat32);
  std::vector<float> values(static_cast<std::size_t>(parameter.num_elements()));
  std::memcpy(values.data(), parameter.data.get(), parameter.bytes());
  return values;
}

Tensors operator+(Tensors first, const Tensors& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

// One layer of an encoder of width 8; the query's weight begins at `first`.
Tensors TowerTensors(const std::string& prefix, float first) {
  Tensors tensors;
  for (const char* name : {"q_proj", "k_proj", "v_proj", "out_proj"}) {
    const std::string start = prefix + "encoder.layers.0.self_attn." + name;
    tensors.push_back(FloatTensor(start + ".weight", {8, 8}, first));
    tensors.push_back(FloatTensor(start + ".bias", {8}, first + 5.0f));
    first += 10.0f;
  }
  return tensors;
}

json TowerConfig(const std::string& model_type, const json& changes = json::object()) {
  json config = {{"model_type", model_type},
                 {"hidden_size", 8},
                 {"num_attention_heads", 2},
                 {"num_hidden_layers", 1},
                 {"max_position_embeddings", 16}};
  config.update(changes);
  return config;
}

json TwoTowers(const std::string& model_type) {
  return {{"model_type", model_type},
          {"text_config", TowerConfig(model_type + "_text_model")},
          {"vision_config", TowerConfig(model_type + "_vision_model")}};
}

Tensors TwoTowerTensors() {
  return TowerTensors("text_model.", 0.0f) + TowerTensors("vision_model.", 100.0f);
}

json Gemma3Text(const json& changes = json::object()) {
  json config = TinyDecoderConfig("gemma3_text");
  config.erase("rope_theta");
  config.update(changes);
  return config;
}

// Qwen3 has the same tensors.
Tensors Gemma3Tensors(const std::string& prefix) {
  return TinyDecoderTensors(TinyDecoderConfig("qwen3"), prefix);
}

json Qwen2VlText(const json& rope = {{"type", "mrope"}, {"mrope_section", {1, 2, 1}}}) {
  json config = TinyDecoderConfig("qwen2_vl_text");
  config.erase("head_dim");
  config["hidden_size"] = 8;
  config["num_attention_heads"] = 1;
  config["num_hidden_layers"] = 1;
  config["rope_scaling"] = rope;
  return config;
}

Tensors Qwen2VlTextTensors(const std::string& prefix) {
  Tensors tensors;
  for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj"}) {
    const std::string start = prefix + "layers.0.self_attn." + name;
    tensors.push_back(FloatTensor(start + ".weight", {8, 8}));
    if (name[0] != 'o') tensors.push_back(FloatTensor(start + ".bias", {8}));
  }
  return tensors;
}

Tensors Qwen2VlVisionTensors(const std::string& prefix) {
  const std::string start = prefix + "blocks.0.attn.";
  return {FloatTensor(start + "qkv.weight", {48, 16}), FloatTensor(start + "qkv.bias", {48}),
          FloatTensor(start + "proj.weight", {16, 16}), FloatTensor(start + "proj.bias", {16})};
}

json Qwen2Vl(json text = Qwen2VlText()) {
  text["model_type"] = "qwen2_vl";
  text["vision_config"] = {{"depth", 1}, {"embed_dim", 16}, {"num_heads", 2}, {"hidden_size", 8}};
  return text;
}

class VisionLanguageFamiliesTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::shared_ptr<const HostedModel>> Create(const json& config,
                                                            const Tensors& tensors,
                                                            DType dtype = DType::kUnspecified) {
    const std::string directory = root_ / "m";
    std::filesystem::create_directories(directory);
    WriteModel(directory, config, tensors);
    ModelSpec spec;
    spec.weights = "m";
    spec.dtype = dtype;
    return HostedModel::Create(spec, {.model_root = root_.path(), .run_slice = {}});
  }

  std::vector<LayerStack> Stacks(const json& config, const Tensors& tensors) {
    const auto model = Create(config, tensors);
    EXPECT_TRUE(model.ok()) << config << model.status();
    if (model.ok()) return (*model)->spec().stacks;
    LayerStack none;
    none.self_attention.resize(1);
    none.self_attention[0].rotary.emplace();
    return {none, none};
  }
  std::vector<LayerSpec> Gemma3Layers(const json& changes) {
    std::vector<LayerSpec> layers;
    const auto model = Create(Gemma3Text(changes), Gemma3Tensors("model."));
    EXPECT_TRUE(model.ok()) << changes << model.status();
    for (std::size_t i = 0; i < 2; ++i) {
      layers.push_back(model.ok() ? *(*model)->Layers()[i]->spec : LayerSpec());
      if (!layers[i].rotary) layers[i].rotary.emplace();
    }
    return layers;
  }

  void ExpectRefused(const json& config, absl::StatusCode code, const std::string& field) {
    const auto model = Create(config, {});
    ASSERT_FALSE(model.ok()) << config << " should be refused for " << field;
    EXPECT_EQ(model.status().code(), code) << model.status();
    EXPECT_EQ(ErrorDetailsOf(model.status())["field"], field) << model.status();
  }
  void ExpectUnsupported(const json& config, const std::string& field) {
    ExpectRefused(config, absl::StatusCode::kUnimplemented, field);
  }
  void ExpectBad(const json& config, const std::string& field) {
    ExpectRefused(config, absl::StatusCode::kInvalidArgument, field);
  }

  TemporaryDirectory root_;
};

TEST_F(VisionLanguageFamiliesTest, TwoTowersAreTwoStacks) {
  for (const std::string family : {"clip", "siglip"}) {
    const auto model = Create(TwoTowers(family), TwoTowerTensors());
    ASSERT_TRUE(model.ok()) << family << model.status();
    EXPECT_EQ((*model)->spec().modality, Modality::kMultimodal);
    const std::vector<LayerStack>& stacks = (*model)->spec().stacks;
    ASSERT_EQ(stacks.size(), 2u);
    EXPECT_EQ(stacks[0].name, "text");
    EXPECT_EQ(stacks[0].modality, Modality::kLanguage);
    EXPECT_EQ(stacks[0].max_positions, 16u);
    EXPECT_EQ(stacks[0].self_attention[0].options.is_causal, family == "clip");
    EXPECT_EQ(stacks[1].name, "vision");
    EXPECT_EQ(stacks[1].modality, Modality::kVision);
    EXPECT_EQ(stacks[1].max_positions, 0u);
    EXPECT_EQ(stacks[1].self_attention[0].options.is_causal, false);
    EXPECT_EQ(stacks[1].self_attention[0].head_dim, 4u);
    ASSERT_EQ((*model)->Layers().size(), 2u);
    EXPECT_EQ(Floats((*model)->Layers()[0]->weights->output.weight)[0], 30.0f);
    EXPECT_EQ(Floats((*model)->Layers()[1]->weights->output.weight)[0], 130.0f);
  }
}

TEST_F(VisionLanguageFamiliesTest, OneTowerIsTheOnlyStack) {
  for (const std::string family : {"clip", "siglip"}) {
    for (const std::string half : {"text_model", "vision_model"}) {
      for (const std::string& prefix : {std::string(), half + "."}) {
        const std::vector<LayerStack> stacks =
            Stacks(TowerConfig(family + "_" + half), TowerTensors(prefix, 0.0f));
        ASSERT_EQ(stacks.size(), 1u) << family << half << prefix;
        EXPECT_EQ(stacks[0].name, "");
        EXPECT_EQ(stacks[0].modality,
                  half == "text_model" ? Modality::kLanguage : Modality::kVision);
      }
    }
    json config = TwoTowers(family);
    config["architectures"] = {"TinyForImageClassification"};
    const std::vector<LayerStack> stacks = Stacks(config, TowerTensors("vision_model.", 0.0f));
    ASSERT_EQ(stacks.size(), 1u);
    EXPECT_EQ(stacks[0].modality, Modality::kVision);
  }
}

TEST_F(VisionLanguageFamiliesTest, TowersHaveTheirClassesDefaults) {
  json config = TwoTowers("clip");
  config["text_config"] = json::object();
  auto model = Create(config, TwoTowerTensors());
  ASSERT_FALSE(model.ok());
  EXPECT_NE(model.status().message().find("[512, 512]"), std::string::npos) << model.status();
  // Where it is there, the library takes it in the place of text_config.
  config["text_config_dict"] = TowerConfig("clip_text_model", {{"num_attention_heads", 4}});
  EXPECT_EQ(Stacks(config, TwoTowerTensors())[0].self_attention[0].num_heads, 4u);
  config["model_type"] = "siglip";
  model = Create(config, TwoTowerTensors());
  ASSERT_FALSE(model.ok()) << "SigLIP has no such field";
}

TEST_F(VisionLanguageFamiliesTest, RefusesWhatATowerDoesNotUnderstand) {
  for (const std::string family : {"clip", "siglip"}) {
    for (const std::string half : {"text_config", "vision_config"}) {
      json config = TwoTowers(family);
      config[half]["head_dim"] = 4;
      ExpectUnsupported(config, half + ".head_dim");
      config = TwoTowers(family);
      config[half]["num_attention_heads"] = 3;
      ExpectBad(config, half + ".num_attention_heads");
      config.erase(half);
      ExpectBad(config, half);
    }
    json config = TwoTowers(family);
    config["quantization_config"] = {{"bits", 4}};
    ExpectUnsupported(config, "quantization_config");
  }
}

TEST_F(VisionLanguageFamiliesTest, Gemma3NormsAreAddedToOne) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const auto model = Create(Gemma3Text(), Gemma3Tensors("model."), dtype);
    ASSERT_TRUE(model.ok()) << model.status();
    const LayerWeights& weights = *(*model)->Layers()[1]->weights;
    EXPECT_EQ(weights.output.weight.dtype, dtype);
    EXPECT_EQ(Floats(weights.query_norm), (std::vector<float>{142, 142.125, 142.25, 142.375}));
    EXPECT_EQ(Floats(weights.key_norm)[0], 143.0f);
  }
}

TEST_F(VisionLanguageFamiliesTest, Gemma3LayersSlideByPattern) {
  std::vector<LayerSpec> layers = Gemma3Layers({{"sliding_window", 16}});
  EXPECT_EQ(layers[0].options.window_left, 15);
  EXPECT_EQ(layers[1].options.window_left, 15);  // the sixth would be a full one
  EXPECT_EQ(layers[0].options.scale, 1.0 / 16.0);
  layers = Gemma3Layers({{"sliding_window_pattern", 2}});
  EXPECT_EQ(layers[0].options.window_left, 4095);
  EXPECT_FALSE(layers[1].options.window_left.has_value());
  EXPECT_EQ(layers[0].rotary->theta, 1e4);
  EXPECT_EQ(layers[1].rotary->theta, 1e6);
  EXPECT_EQ(layers[0].options.is_causal, true);
  EXPECT_FALSE(layers[0].options.window_right.has_value());

  layers = Gemma3Layers({{"layer_types", {"full_attention", "sliding_attention"}},
                         {"sliding_window", 16},
                         {"use_bidirectional_attention", true}});
  EXPECT_EQ(layers[0].options.is_causal, false);
  EXPECT_FALSE(layers[0].options.window_right.has_value());
  EXPECT_EQ(layers[1].options.is_causal, false);
  EXPECT_EQ(layers[1].options.window_left, 8);
  EXPECT_EQ(layers[1].options.window_right, 8);
}

TEST_F(VisionLanguageFamiliesTest, Gemma3HasARotaryForEachKindOfLayer) {
  json changes = {{"sliding_window_pattern", 2},
                  {"rope_theta", 5000.0},
                  {"rope_local_base_freq", 300.0},
                  {"rope_scaling", {{"rope_type", "linear"}, {"factor", 8.0}}}};
  std::vector<LayerSpec> layers = Gemma3Layers(changes);
  EXPECT_EQ(layers[0].rotary->theta, 300.0);
  EXPECT_EQ(layers[0].rotary->scaling, "");
  EXPECT_EQ(layers[1].rotary->theta, 5000.0);
  EXPECT_EQ(layers[1].rotary->scaling, "linear");
  const json kinds = {
      {"full_attention", {{"rope_type", "linear"}, {"factor", 2.0}, {"rope_theta", 70.0}}},
      {"sliding_attention", {{"rope_theta", 30.0}}}};
  layers = Gemma3Layers({{"sliding_window_pattern", 2}, {"rope_parameters", kinds}});
  EXPECT_EQ(layers[0].rotary->theta, 30.0);
  EXPECT_EQ(layers[0].rotary->scaling, "");
  EXPECT_EQ(layers[1].rotary->theta, 70.0);
  EXPECT_EQ(layers[1].rotary->scaling_parameters.at("factor"), 2.0);

  changes["rope_parameters"] = kinds;
  ExpectUnsupported(Gemma3Text(changes), "rope_scaling");
  ExpectUnsupported(Gemma3Text({{"rope_parameters", {{"rope_type", "linear"}}}}),
                    "rope_parameters.rope_type");
  ExpectUnsupported(Gemma3Text({{"rope_parameters", {{"chunked_attention", {}}}}}),
                    "rope_parameters.chunked_attention");
  ExpectUnsupported(
      Gemma3Text({{"rope_parameters", {{"sliding_attention", {{"rope_type", "other"}}}}}}),
      "rope_parameters.sliding_attention.rope_type");
  ExpectUnsupported(Gemma3Text({{"attn_logit_softcapping", 50.0}}), "attn_logit_softcapping");
}

TEST_F(VisionLanguageFamiliesTest, Gemma3HasATextAndAVisionStack) {
  json config = {{"model_type", "gemma3"},
                 {"text_config", Gemma3Text()},
                 {"vision_config", TowerConfig("siglip_vision_model")}};
  const std::pair<const char*, const char*> cases[] = {
      {"language_model.model.", "vision_tower.vision_model."},
      {"language_model.model.", "vision_tower."},
      {"model.language_model.", "model.vision_tower."},
      {"model.language_model.", "model.vision_tower.vision_model."}};
  for (const auto& [text, vision] : cases) {
    const std::vector<LayerStack> stacks =
        Stacks(config, Gemma3Tensors(text) + TowerTensors(vision, 0.0f));
    ASSERT_EQ(stacks.size(), 2u);
    EXPECT_EQ(stacks[0].name, "text");
    EXPECT_EQ(stacks[0].self_attention[0].num_kv_heads, 1u);
    EXPECT_EQ(stacks[1].name, "vision");
  }
  config["vision_config"]["model_type"] = "clip_vision_model";
  ExpectUnsupported(config, "vision_config.model_type");
  config["text_config"]["no_rope_layers"] = {1};
  ExpectUnsupported(config, "text_config.no_rope_layers");
}

TEST_F(VisionLanguageFamiliesTest, Qwen2VlRotatesByAxes) {
  json nested = {{"model_type", "qwen2_vl"}, {"text_config", Qwen2VlText()}};
  nested["vision_config"] = Qwen2Vl()["vision_config"];
  nested["num_key_value_heads"] = 4;  // beside text_config it means nothing
  const Tensors tensors = Qwen2VlTextTensors("model.") + Qwen2VlVisionTensors("visual.");
  for (const json& config : {Qwen2Vl(), nested}) {
    const std::vector<LayerStack> stacks = Stacks(config, tensors);
    ASSERT_EQ(stacks.size(), 2u) << config;
    EXPECT_EQ(stacks[0].name, "text");
    const LayerSpec& text = stacks[0].self_attention[0];
    EXPECT_EQ(text.num_kv_heads, 1u);
    EXPECT_EQ(text.rotary->scaling, "");
    EXPECT_EQ(text.rotary->axis_sections, (std::vector<std::uint32_t>{1, 2, 1}));
    EXPECT_FALSE(text.rotary->frequencies_per_axis);
    EXPECT_EQ(stacks[1].name, "vision");
    EXPECT_EQ(stacks[1].hidden_size, 16u);
    const LayerSpec& vision = stacks[1].self_attention[0];
    EXPECT_EQ(vision.options.is_causal, false);
    EXPECT_EQ(vision.rotary->theta, 1e4);
    EXPECT_EQ(vision.rotary->axis_sections, (std::vector<std::uint32_t>{2, 2}));
    EXPECT_TRUE(vision.rotary->frequencies_per_axis);
  }
  EXPECT_EQ(Stacks(Qwen2Vl(), Qwen2VlTextTensors("model.language_model.") +
                                  Qwen2VlVisionTensors("model.visual."))
                .size(),
            2u);
  EXPECT_EQ(Stacks(Qwen2VlText(), Qwen2VlTextTensors(""))[0].name, "");
}

TEST_F(VisionLanguageFamiliesTest, RefusesWhatQwen2VlDoesNotUnderstand) {
  const auto sections = [](const json& value) {
    return Qwen2Vl(Qwen2VlText({{"rope_type", "default"}, {"mrope_section", value}}));
  };
  const std::string field = "rope_scaling.mrope_section";
  ExpectBad(sections({1, 2}), field);
  ExpectBad(sections({2, 2, 2}), field);
  ExpectBad(sections({1.5, 1.5, 1}), field);
  ExpectBad(sections({0, 2, 2}), field);
  ExpectBad(sections(3), field);
  ExpectBad(Qwen2Vl(Qwen2VlText(nullptr)), "mrope_section");  // the class's are for heads of 128
  json interleaved = {{"type", "mrope"}, {"mrope_section", {1, 2, 1}}, {"mrope_interleaved", true}};
  ExpectUnsupported(Qwen2Vl(Qwen2VlText(interleaved)), "rope_scaling.mrope_interleaved");
  json config = Qwen2Vl();
  config["head_dim"] = 16;
  config["rope_scaling"]["mrope_section"] = {2, 3, 3};
  ExpectUnsupported(config, "head_dim");
  config = Qwen2Vl();
  config["vision_config"]["rope_parameters"] = {{"rope_type", "linear"}};
  ExpectUnsupported(config, "vision_config.rope_parameters.rope_type");
  config = Qwen2Vl();
  config["vision_config"]["embed_dim"] = 12;
  ExpectBad(config, "vision_config.embed_dim");
  config = Qwen2Vl();
  config["vision_config"]["num_attention_heads"] = 4;
  ExpectBad(config, "vision_config.num_heads");
  config = Qwen2Vl();
  config["vision_config"]["fullatt_block_indexes"] = {0};
  ExpectUnsupported(config, "vision_config.fullatt_block_indexes");
}

}  // namespace
}  // namespace attn
