// Tiny model directories for tests: the config and tensors of a family, with what a test wants
// changed.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/core/safetensors_writer.h"

namespace attn::testing {

// Two layers, hidden size 4, two heads of 2.
nlohmann::json TinyBertConfig();
nlohmann::json TinyVitConfig();

// Of a causal decoder's model_type: two layers, hidden size 8, two heads of 4, one KV head, theta
// 10,000.
nlohmann::json TinyDecoderConfig(const std::string& model_type);
// What such a config calls for (biases, norms, sinks, fused projections), as `prefix` + layers.0...
std::vector<TestTensor> TinyDecoderTensors(const nlohmann::json& config,
                                           const std::string& prefix = "model.");

// Where a layer's projections are called `prefix` + layer + one of these.
struct TinyNames {
  std::string prefix;
  std::string query, key, value, output;
};
TinyNames BertNames(const std::string& prefix = "");
TinyNames OldVitNames(const std::string& prefix = "");
TinyNames NewVitNames(const std::string& prefix = "");

// Attention tensors of `layers` layers and one that is none of attention's. Layer l's query, key,
// value and output weights begin at 100 l + 0, 10, 20, 30, their biases 5 later.
std::vector<TestTensor> TinyTensors(const TinyNames& names, int layers = 2, bool qkv_bias = true);

// config.json and model.safetensors in an existing directory.
void WriteModel(const std::string& directory, const nlohmann::json& config,
                const std::vector<TestTensor>& tensors);

}  // namespace attn::testing
