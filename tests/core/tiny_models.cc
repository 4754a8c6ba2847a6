#include "tests/core/tiny_models.h"

namespace attn::testing {

nlohmann::json TinyBertConfig() {
  return {{"model_type", "bert"},
          {"architectures", {"BertModel"}},
          {"hidden_size", 4},
          {"num_attention_heads", 2},
          {"num_hidden_layers", 2},
          {"max_position_embeddings", 16},
          {"is_decoder", false},
          {"add_cross_attention", false},
          {"pad_token_id", 0},
          {"position_embedding_type", "absolute"},
          {"layer_norm_eps", 1e-12},
          {"bos_token_id", nullptr},
          {"transformers_version", "5"},
          {"dtype", "float32"}};
}

nlohmann::json TinyVitConfig() {
  return {{"model_type", "vit"},    {"hidden_size", 4}, {"num_attention_heads", 2},
          {"num_hidden_layers", 2}, {"image_size", 8},  {"qkv_bias", true}};
}

nlohmann::json TinyDecoderConfig(const std::string& model_type) {
  return {{"model_type", model_type},      {"hidden_size", 8},     {"num_attention_heads", 2},
          {"num_key_value_heads", 1},      {"head_dim", 4},        {"num_hidden_layers", 2},
          {"max_position_embeddings", 64}, {"rope_theta", 10000.0}};
}

std::vector<TestTensor> TinyDecoderTensors(const nlohmann::json& config,
                                           const std::string& prefix) {
  const std::string type = config.at("model_type");
  const bool all = config.value("attention_bias", type == "gpt_oss");
  std::vector<TestTensor> tensors;
  for (int layer = 0; layer < 2; ++layer) {
    const std::string start = prefix + "layers." + std::to_string(layer) + ".self_attn.";
    auto first = static_cast<float>(100 * layer);
    const auto projection = [&](const std::string& name, std::int64_t rows, bool bias) {
      tensors.push_back(FloatTensor(start + name + ".weight", {rows, 8}, first));
      if (bias) tensors.push_back(FloatTensor(start + name + ".bias", {rows}, first + 9.0f));
      first += 10.0f;
    };
    if (type == "phi3") {
      projection("qkv_proj", 16, false);
    } else {
      projection("q_proj", 8, all || type == "qwen2");
      projection("k_proj", 4, all || type == "qwen2");
      projection("v_proj", 4, all || type == "qwen2");
    }
    projection("o_proj", 8, all);
    if (type == "qwen3") {
      tensors.push_back(FloatTensor(start + "q_norm.weight", {4}, first + 1.0f));
      tensors.push_back(FloatTensor(start + "k_norm.weight", {4}, first + 2.0f));
    }
    if (type == "gpt_oss") tensors.push_back(FloatTensor(start + "sinks", {2}, first));
  }
  return tensors;
}

TinyNames BertNames(const std::string& prefix) {
  return {prefix + "encoder.layer.", ".attention.self.query", ".attention.self.key",
          ".attention.self.value", ".attention.output.dense"};
}

TinyNames OldVitNames(const std::string& prefix) {
  return {prefix + "encoder.layer.", ".attention.attention.query", ".attention.attention.key",
          ".attention.attention.value", ".attention.output.dense"};
}

TinyNames NewVitNames(const std::string& prefix) {
  return {prefix + "layers.", ".attention.q_proj", ".attention.k_proj", ".attention.v_proj",
          ".attention.o_proj"};
}

std::vector<TestTensor> TinyTensors(const TinyNames& names, int layers, bool qkv_bias) {
  std::vector<TestTensor> tensors = {FloatTensor("embeddings.weight", {3, 4})};
  for (int layer = 0; layer < layers; ++layer) {
    const std::string start = names.prefix + std::to_string(layer);
    auto first = static_cast<float>(100 * layer);
    for (const std::string& name : {names.query, names.key, names.value, names.output}) {
      tensors.push_back(FloatTensor(start + name + ".weight", {4, 4}, first));
      if (qkv_bias || name == names.output) {
        tensors.push_back(FloatTensor(start + name + ".bias", {4}, first + 5.0f));
      }
      first += 10.0f;
    }
  }
  return tensors;
}

void WriteModel(const std::string& directory, const nlohmann::json& config,
                const std::vector<TestTensor>& tensors) {
  WriteFile(directory + "/config.json", config.dump());
  WriteFile(directory + "/model.safetensors", SafetensorsBytes(tensors));
}

}  // namespace attn::testing
