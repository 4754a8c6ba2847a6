// A whole model through one interface, whatever it works on: language, vision, or one looking at
// the other. Lists its layers by modality, and runs raw float32 hidden states through one of them.
#include <memory>
#include <string>

#include "core/multi_model_adapter.h"
#include "docs/examples/floats.h"

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: modalities DIRECTORY language|vision|multimodal LAYER < floats\n");
    return 2;
  }
  attn::ModelSpec spec;
  spec.name = "example";
  spec.weights = argv[1];
  attn::AdapterConfig config;  // implementations, cores, memory: all have defaults
  config.threads = 2;
  const std::unique_ptr<attn::MultiModelAttentionAdapter> adapter =
      OrExit(attn::MultiModelAttentionAdapter::Create(config, spec));

  std::vector<attn::LayerRef> wanted;
  for (const attn::Modality modality :
       {attn::Modality::kLanguage, attn::Modality::kVision, attn::Modality::kMultimodal}) {
    const std::vector<attn::LayerRef> layers = adapter->Layers(modality);
    std::printf("%s: %zu layers\n", attn::ModalityName(modality), layers.size());
    if (argv[2] == std::string(attn::ModalityName(modality))) wanted = layers;
  }
  const auto index = static_cast<std::size_t>(std::atoi(argv[3]));
  if (index >= wanted.size()) {
    std::fprintf(stderr, "%s has no such layer: %s %zu\n", argv[1], argv[2], index);
    return 1;
  }
  const std::int64_t hidden_size = adapter->spec().stacks.front().hidden_size;
  const std::vector<float> hidden = ReadFloats();
  const auto tokens = static_cast<std::int64_t>(hidden.size()) / hidden_size;
  attn::ForwardInputs inputs;
  inputs.hidden_states =
      attn::TensorView(hidden.data(), attn::DType::kFloat32, {1, tokens, hidden_size});
  const attn::AdapterResult result = OrExit(adapter->Forward(wanted[index], inputs));
  std::printf("%s: %s\n", result.implementation.c_str(), result.reason.c_str());
  std::printf("checksum %.9g\n",
              Checksum(static_cast<const float*>(result.output.view.data), tokens * hidden_size));
}
