// The causal families: what a config makes of each layer, and what it may not say.
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

const char* const kDecoders[] = {"gemma2", "gpt_oss", "llama", "mistral", "phi3", "qwen2", "qwen3"};

std::vector<float> Floats(const Parameter& parameter) {
  EXPECT_EQ(parameter.dtype, DType::kFloat32);
  std::vector<float> values(static_cast<std::size_t>(parameter.num_elements()));
  std::memcpy(values.data(), parameter.data.get(), parameter.bytes());
  return values;
}

json Decoder(const std::string& type, const json& changes = json::object()) {
  json config = TinyDecoderConfig(type);
  config.update(changes);
  return config;
}

class DecoderFamiliesTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::shared_ptr<const HostedModel>> Create(const json& config,
                                                            const std::string& prefix = "model.") {
    return Create(config, TinyDecoderTensors(config, prefix));
  }
  absl::StatusOr<std::shared_ptr<const HostedModel>> Create(
      const json& config, const std::vector<TestTensor>& tensors) {
    const std::string directory = root_ / "m";
    std::filesystem::create_directories(directory);
    WriteModel(directory, config, tensors);
    ModelSpec spec;
    spec.weights = "m";
    return HostedModel::Create(spec, {.model_root = root_.path(), .run_slice = {}});
  }

  std::vector<LayerSpec> Layers(const json& config) {
    const auto model = Create(config);
    EXPECT_TRUE(model.ok()) << config << model.status();
    std::vector<LayerSpec> layers;
    if (!model.ok()) return layers;
    for (const HostedLayer* layer : (*model)->Layers()) layers.push_back(*layer->spec);
    return layers;
  }
  RotaryEmbedding Rope(const json& config) {
    const std::vector<LayerSpec> layers = Layers(config);
    return layers.empty() || !layers[0].rotary ? RotaryEmbedding() : *layers[0].rotary;
  }
  // window_left of both layers.
  std::vector<std::int64_t> Windows(const json& config) {
    std::vector<std::int64_t> windows;
    for (const LayerSpec& layer : Layers(config)) {
      windows.push_back(layer.options.window_left.value_or(-1));
    }
    return windows;
  }

  void ExpectRefused(const json& config, absl::StatusCode code, const std::string& field) {
    const auto model = Create(config);
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

TEST_F(DecoderFamiliesTest, EachFamilyLoadsUnderBothPrefixes) {
  for (const std::string type : kDecoders) {
    for (const std::string prefix : {"", "model."}) {
      const auto model = Create(Decoder(type), prefix);
      ASSERT_TRUE(model.ok()) << type << model.status();
      const LayerStack& stack = (*model)->spec().stacks[0];
      EXPECT_EQ((*model)->spec().modality, Modality::kLanguage);
      EXPECT_EQ(stack.hidden_size, 8u);
      EXPECT_EQ(stack.max_positions, 0u);
      ASSERT_EQ((*model)->Layers().size(), 2u) << type;
      for (const HostedLayer* layer : (*model)->Layers()) {
        EXPECT_EQ(layer->spec->num_heads, 2u);
        EXPECT_EQ(layer->spec->num_kv_heads, 1u);
        EXPECT_EQ(layer->spec->head_dim, 4u);
        EXPECT_EQ(layer->spec->value_dim, 4u);
        EXPECT_EQ(layer->spec->options.is_causal, true);
        ASSERT_NE(layer->rotary, nullptr);
        EXPECT_EQ(layer->rotary->pairs(), 2);
        EXPECT_EQ(layer->weights->query_key_value.weight.shape, (std::vector<std::int64_t>{16, 8}));
      }
      const std::vector<float> weight = Floats((*model)->Layers()[1]->weights->output.weight);
      EXPECT_EQ(weight[1], (type == "phi3" ? 110.0f : 130.0f) + 0.125f) << type;
    }
  }
}

TEST_F(DecoderFamiliesTest, LayersOfARunShareTheirRotary) {
  const auto model = Create(Decoder("llama"));
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ((*model)->Layers()[0]->rotary, (*model)->Layers()[1]->rotary);
}

TEST_F(DecoderFamiliesTest, ClassesDefaultsHoldWhereTheFileSaysNothing) {
  json config = Decoder("llama");
  config.erase("head_dim");
  config.erase("rope_theta");
  config["num_key_value_heads"] = nullptr;
  std::vector<TestTensor> tensors;
  for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj"}) {
    for (const char* layer : {"0", "1"}) {
      tensors.push_back(
          FloatTensor(std::string("layers.") + layer + ".self_attn." + name + ".weight", {8, 8}));
    }
  }
  auto model = Create(config, tensors);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ((*model)->Layers()[0]->spec->num_kv_heads, 2u);
  EXPECT_EQ((*model)->Layers()[0]->spec->head_dim, 4u);
  EXPECT_EQ((*model)->Layers()[0]->spec->rotary->theta, 10000.0);

  config = Decoder("qwen3");
  config.erase("head_dim");
  model = Create(config);
  ASSERT_FALSE(model.ok());
  EXPECT_NE(model.status().message().find("[256, 8]"), std::string::npos) << model.status();

  for (const auto& [type, window] :
       {std::pair("mistral", 4095), std::pair("gemma2", 4095), std::pair("gpt_oss", 127),
        std::pair("phi3", -1), std::pair("qwen2", -1), std::pair("llama", -1)}) {
    EXPECT_EQ(Windows(Decoder(type))[0], window) << type;
  }
  const RotaryEmbedding yarn = Rope([] {
    json changed = Decoder("gpt_oss");
    changed.erase("rope_theta");
    return changed;
  }());
  EXPECT_EQ(yarn.theta, 150000.0);
  EXPECT_EQ(yarn.scaling, "yarn");
  EXPECT_EQ(yarn.scaling_parameters.at("truncate"), 0.0);
}

TEST_F(DecoderFamiliesTest, WindowsGoByLayer) {
  using Two = std::vector<std::int64_t>;
  EXPECT_EQ(Windows(Decoder("mistral", {{"sliding_window", 16}})), (Two{15, 15}));
  EXPECT_EQ(Windows(Decoder("mistral", {{"sliding_window", nullptr}})), (Two{-1, -1}));
  EXPECT_EQ(Windows(Decoder("phi3", {{"sliding_window", 1}})), (Two{0, 0}));
  const json sliding_last = {"full_attention", "sliding_attention"};
  for (const char* type : {"gemma2", "gpt_oss"}) {
    EXPECT_EQ(Windows(Decoder(type, {{"sliding_window", 16}})), (Two{15, -1})) << type;
    EXPECT_EQ(Windows(Decoder(type, {{"sliding_window", 16}, {"layer_types", sliding_last}})),
              (Two{-1, 15}));
    ExpectBad(Decoder(type, {{"sliding_window", nullptr}}), "sliding_window");
    ExpectUnsupported(Decoder(type, {{"layer_types", {"full_attention", "chunked_attention"}}}),
                      "layer_types");
    ExpectBad(Decoder(type, {{"layer_types", {"full_attention"}}}), "layer_types");
    ExpectBad(Decoder(type, {{"layer_types", {"full_attention", 3}}}), "layer_types");
    ExpectBad(Decoder(type, {{"layer_types", "full_attention"}}), "layer_types");
  }
  for (const char* type : {"qwen2", "qwen3"}) {
    json changes = {{"sliding_window", 16}, {"max_window_layers", 1}};
    EXPECT_EQ(Windows(Decoder(type, changes)), (Two{-1, -1}));
    changes["use_sliding_window"] = true;
    EXPECT_EQ(Windows(Decoder(type, changes)), (Two{-1, 15}));
    changes["max_window_layers"] = 28;
    EXPECT_EQ(Windows(Decoder(type, changes)), (Two{-1, -1}));
    changes["layer_types"] = {"sliding_attention", "full_attention"};
    EXPECT_EQ(Windows(Decoder(type, changes)), (Two{15, -1}));
    changes["use_sliding_window"] = false;
    ExpectBad(Decoder(type, changes), "sliding_window");
  }
}

TEST_F(DecoderFamiliesTest, Gemma2ScalesAndCaps) {
  LayerSpec layer = Layers(Decoder("gemma2"))[0];
  EXPECT_EQ(layer.options.scale, 1.0 / 16.0);
  EXPECT_EQ(layer.options.soft_cap, 50.0);
  layer = Layers(
      Decoder("gemma2", {{"query_pre_attn_scalar", 144}, {"attn_logit_softcapping", nullptr}}))[0];
  EXPECT_EQ(layer.options.scale, 1.0 / 12.0);
  EXPECT_FALSE(layer.options.soft_cap.has_value());
  EXPECT_EQ(Windows(Decoder("gemma2", {{"sliding_window_size", 16}}))[0], 4095);
  ExpectBad(Decoder("gemma2", {{"query_pre_attn_scalar", 0}}), "query_pre_attn_scalar");
  ExpectBad(Decoder("gemma2", {{"attn_logit_softcapping", 0}}), "attn_logit_softcapping");
}

TEST_F(DecoderFamiliesTest, Qwen3NormalisesHeads) {
  const auto model = Create(Decoder("qwen3", {{"rms_norm_eps", 1e-5}}));
  ASSERT_TRUE(model.ok()) << model.status();
  const LayerWeights& weights = *(*model)->Layers()[1]->weights;
  EXPECT_EQ(Floats(weights.query_norm), (std::vector<float>{141, 141.125, 141.25, 141.375}));
  EXPECT_EQ(Floats(weights.key_norm)[0], 142.0f);
  EXPECT_EQ(weights.norm_epsilon, 1e-5f);
  EXPECT_FALSE(weights.query_key_value.bias.defined());
  EXPECT_EQ((*model)->weight_bytes(), 2u * (16 * 8 + 8 * 8 + 4 + 4) * sizeof(float));
}

TEST_F(DecoderFamiliesTest, BiasesGoByFamily) {
  const auto biases = [&](const json& config) {
    const auto model = Create(config);
    EXPECT_TRUE(model.ok()) << model.status();
    const LayerWeights& weights = *(*model)->Layers()[0]->weights;
    return std::pair(weights.query_key_value.bias.defined(), weights.output.bias.defined());
  };
  EXPECT_EQ(biases(Decoder("llama")), std::pair(false, false));
  EXPECT_EQ(biases(Decoder("qwen2")), std::pair(true, false));
  EXPECT_EQ(biases(Decoder("gpt_oss")), std::pair(true, true));
  for (const char* type : {"llama", "qwen3", "gemma2", "gpt_oss"}) {
    EXPECT_EQ(biases(Decoder(type, {{"attention_bias", true}})), std::pair(true, true)) << type;
    EXPECT_EQ(biases(Decoder(type, {{"attention_bias", false}})), std::pair(false, false)) << type;
  }
}

TEST_F(DecoderFamiliesTest, GptOssHasSinksInEveryLayer) {
  const json config = Decoder("gpt_oss", {{"layer_types", {"full_attention", "full_attention"}}});
  const auto model = Create(config);
  ASSERT_TRUE(model.ok()) << model.status();
  ASSERT_EQ((*model)->spec().stacks[0].self_attention.size(), 2u);
  EXPECT_EQ((*model)->Layers()[0]->spec->options.sink_logits, (std::vector<float>{40, 40.125}));
  EXPECT_EQ((*model)->Layers()[1]->spec->options.sink_logits, (std::vector<float>{140, 140.125}));

  // A caller may repeat them.
  ModelSpec asked = (*model)->spec();
  const LoadOptions options{.model_root = root_.path(), .run_slice = {}};
  EXPECT_TRUE(HostedModel::Create(asked, options).ok());
  asked.stacks[0].self_attention[1].options.sink_logits->front() = 0.0f;
  EXPECT_EQ(ErrorDetailsOf(HostedModel::Create(asked, options).status())["field"],
            "stacks[0].self_attention[1].options.sink_logits");

  std::vector<TestTensor> tensors = TinyDecoderTensors(config);
  const std::string name = tensors.back().name;
  tensors.back() = HalfTensor(name, "BF16", {2}, {0x3f80, 0xff80});
  const auto narrow = Create(config, tensors);
  ASSERT_TRUE(narrow.ok()) << narrow.status();
  EXPECT_EQ((*narrow)->spec().dtype, DType::kFloat32) << "of the projections";
  EXPECT_EQ((*narrow)->Layers()[1]->spec->options.sink_logits->front(), 1.0f);
  tensors.back() = HalfTensor(name, "BF16", {2}, {0x3f80, 0x7fc0});
  EXPECT_EQ(ErrorDetailsOf(Create(config, tensors).status())["tensor"], name);
  tensors.back() = FloatTensor(name, {4});
  EXPECT_EQ(ErrorDetailsOf(Create(config, tensors).status())["tensor"], name);
}

TEST_F(DecoderFamiliesTest, ExpertsAloneMayBeQuantised) {
  json quantization = {{"quant_method", "mxfp4"},
                       {"modules_to_not_convert", {"model.layers.*.self_attn", "lm_head"}}};
  EXPECT_EQ(Layers(Decoder("gpt_oss", {{"quantization_config", quantization}})).size(), 2u);
  ExpectUnsupported(Decoder("llama", {{"quantization_config", quantization}}),
                    "quantization_config");
  quantization["modules_to_not_convert"] = {"lm_head"};
  ExpectUnsupported(Decoder("gpt_oss", {{"quantization_config", quantization}}),
                    "quantization_config");
  quantization["modules_to_not_convert"] = {"model.layers.*.self_attn"};
  quantization["quant_method"] = "fp8";
  ExpectUnsupported(Decoder("gpt_oss", {{"quantization_config", quantization}}),
                    "quantization_config");
}

TEST_F(DecoderFamiliesTest, BothSpellingsOfRotaryParameters) {
  const json llama3 = {{"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 16}};
  for (const char* type_name : {"type", "rope_type"}) {
    for (const char* object : {"rope_scaling", "rope_parameters"}) {
      json scaling = llama3;
      scaling[type_name] = "llama3";
      RotaryEmbedding rotary = Rope(Decoder("llama", {{object, scaling}, {"rope_theta", 5000}}));
      EXPECT_EQ(rotary.theta, 5000.0);
      EXPECT_EQ(rotary.rotary_dim, 4u);
      EXPECT_EQ(rotary.scaling, "llama3");
      EXPECT_EQ(rotary.scaling_parameters, (std::map<std::string, double>(llama3)));
      scaling["rope_theta"] = 7000.0;
      rotary = Rope(Decoder("llama", {{object, scaling}, {"rope_theta", 5000}}));
      EXPECT_EQ(rotary.theta, 7000.0);
    }
  }
  for (const json& off : {json(nullptr), json::object(), json({{"rope_type", "default"}})}) {
    EXPECT_EQ(Rope(Decoder("llama", {{"rope_scaling", off}})).scaling, "");
  }
  // Lengths and factors that the object leaves out.
  RotaryEmbedding rotary =
      Rope(Decoder("qwen2", {{"rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}}}));
  EXPECT_EQ(rotary.scaling_parameters.at("max_position_embeddings"), 64.0);
  rotary = Rope(Decoder("qwen2", {{"rope_scaling",
                                   {{"type", "yarn"},
                                    {"factor", nullptr},
                                    {"truncate", false},
                                    {"original_max_position_embeddings", 16}}}}));
  EXPECT_EQ(rotary.scaling_parameters.at("factor"), 4.0);
  EXPECT_EQ(rotary.scaling_parameters.at("truncate"), 0.0);
}

TEST_F(DecoderFamiliesTest, Phi3RotatesByLongRope) {
  const json factors = {{"short_factor", {1.0}}, {"long_factor", {2.0}}};
  for (const char* type : {"longrope", "su", "yarn"}) {
    json scaling = factors;
    scaling["type"] = type;
    const RotaryEmbedding rotary =
        Rope(Decoder("phi3", {{"rope_scaling", scaling},
                              {"partial_rotary_factor", 0.5},
                              {"original_max_position_embeddings", 16}}));
    EXPECT_EQ(rotary.scaling, "longrope");
    EXPECT_EQ(rotary.rotary_dim, 2u);
    EXPECT_EQ(rotary.short_factor, (std::vector<double>{1.0}));
    EXPECT_EQ(rotary.long_factor, (std::vector<double>{2.0}));
    EXPECT_EQ(rotary.scaling_parameters.at("factor"), 4.0);
    EXPECT_EQ(rotary.scaling_parameters.at("original_max_position_embeddings"), 16.0);
  }
  json scaling = factors;
  scaling["rope_type"] = "longrope";
  ExpectBad(Decoder("phi3", {{"rope_scaling", scaling}}), "rope_scaling.short_factor");
  scaling["rope_type"] = "linear";
  ExpectUnsupported(Decoder("phi3", {{"rope_parameters", scaling}}), "rope_parameters.rope_type");
  ExpectBad(Decoder("phi3", {{"partial_rotary_factor", 0.75}}), "partial_rotary_factor");
}

TEST_F(DecoderFamiliesTest, RefusesWhatItDoesNotUnderstand) {
  const auto rope = [](const json& parameters) { return json{{"rope_parameters", parameters}}; };
  ExpectUnsupported(Decoder("llama", rope({{"rope_type", "proportional"}})),
                    "rope_parameters.rope_type");
  ExpectUnsupported(Decoder("llama", {{"rope_scaling", {{"type", "mrope"}}}}), "rope_scaling.type");
  ExpectUnsupported(Decoder("llama", rope({{"rope_type", ""}})), "rope_parameters.rope_type");
  ExpectUnsupported(Decoder("llama", rope({{"mrope_section", {1, 1}}})),
                    "rope_parameters.mrope_section");
  ExpectUnsupported(Decoder("llama", rope({{"full_attention", {{"rope_theta", 1e4}}}})),
                    "rope_parameters.full_attention");
  ExpectUnsupported(Decoder("llama", rope({{"partial_rotary_factor", 0.5}})),
                    "rope_parameters.partial_rotary_factor");
  ExpectUnsupported(Decoder("mistral", {{"partial_rotary_factor", 0.5}}), "partial_rotary_factor");
  for (const std::string type : kDecoders) {
    ExpectUnsupported(Decoder(type, {{"is_causal", false}}), "is_causal");
    ExpectUnsupported(Decoder(type, {{"use_bidirectional_attention", true}}),
                      "use_bidirectional_attention");
    ExpectUnsupported(Decoder(type, {{"no_rope_layers", {0, 1}}}), "no_rope_layers");
    ExpectUnsupported(Decoder(type, {{"kv_lora_rank", 2}}), "kv_lora_rank");
    if (type != "gemma2") {
      ExpectUnsupported(Decoder(type, {{"attn_logit_softcapping", 50.0}}),
                        "attn_logit_softcapping");
    }
  }
  ExpectUnsupported(Decoder("llama", {{"sliding_window", 16}}), "sliding_window");
  ExpectUnsupported(Decoder("mistral", {{"layer_types", {"full_attention", "full_attention"}}}),
                    "layer_types");
  ExpectUnsupported(Decoder("qwen2", {{"attention_bias", true}}), "attention_bias");
}

TEST_F(DecoderFamiliesTest, NamesTheFieldThatIsWrong) {
  const auto rope = [](const json& parameters) { return json{{"rope_parameters", parameters}}; };
  ExpectBad(Decoder("llama", {{"num_key_value_heads", 3}}), "num_key_value_heads");
  ExpectBad(Decoder("llama", {{"head_dim", 0}}), "head_dim");
  ExpectBad(Decoder("llama", {{"head_dim", 3}}), "head_dim");
  ExpectBad(Decoder("llama", {{"head_dim", nullptr}, {"hidden_size", 9}}), "hidden_size");
  ExpectBad(Decoder("llama", {{"rope_theta", 0}}), "rope_theta");
  ExpectBad(Decoder("llama", {{"rope_theta", "1e4"}}), "rope_theta");
  ExpectBad(Decoder("llama", rope(3)), "rope_parameters");
  ExpectBad(Decoder("llama", rope({{"rope_type", 3}})), "rope_parameters.rope_type");
  ExpectBad(Decoder("llama", rope({{"rope_type", "linear"}})), "rope_parameters.factor");
  ExpectBad(Decoder("llama", rope({{"rope_type", "linear"}, {"factor", "2"}})),
            "rope_parameters.factor");
  ExpectBad(Decoder("llama", rope({{"rope_type", "linear"}, {"factor", 0}})),
            "spec.stacks[0].self_attention[0].rotary.scaling_parameters.factor");
  json longrope = {{"rope_type", "longrope"}, {"short_factor", {1, 1}}};
  ExpectBad(Decoder("llama", rope(longrope)), "rope_parameters.long_factor");
  longrope["long_factor"] = {1, "1"};
  ExpectBad(Decoder("llama", rope(longrope)), "rope_parameters.long_factor");
  ExpectBad(Decoder("mistral", {{"sliding_window", 0}}), "sliding_window");
}

TEST_F(DecoderFamiliesTest, NamesTheTensorThatIsWrong) {
  for (const auto& [type, name] :
       {std::pair("phi3", "qkv_proj.weight"), std::pair("qwen3", "q_norm.weight"),
        std::pair("qwen3", "k_norm.weight"), std::pair("gpt_oss", "sinks"),
        std::pair("gpt_oss", "k_proj.bias"), std::pair("llama", "v_proj.weight")}) {
    const std::string full = std::string("model.layers.1.self_attn.") + name;
    std::vector<TestTensor> tensors = TinyDecoderTensors(Decoder(type));
    bool found = false;
    for (TestTensor& tensor : tensors) {
      if (tensor.name != full) continue;
      found = true;
      tensor = FloatTensor(full, {7});
    }
    ASSERT_TRUE(found) << full;
    EXPECT_EQ(ErrorDetailsOf(Create(Decoder(type), tensors).status())["tensor"], full);
    std::erase_if(tensors, [&](const TestTensor& tensor) { return tensor.name == full; });
    EXPECT_EQ(ErrorDetailsOf(Create(Decoder(type), tensors).status())["tensor"], full);
  }
}

}  // namespace
}  // namespace attn
