// One attention layer of a model's directory in a program of one's own, without a server: raw
// float32 hidden states in, the layer's output, as a checksum, out.
#include <memory>

#include "core/device.h"
#include "core/factory.h"
#include "core/workspace.h"
#include "docs/examples/floats.h"

int main(int argc, char** argv) {
  if (argc != 4 && argc != 5) {
    std::fprintf(stderr, "usage: layer DIRECTORY LAYER HIDDEN_SIZE [IMPLEMENTATION] < floats\n");
    return 2;
  }
  attn::ModelSpec spec;  // what is left unset is read from the directory
  spec.name = "example";
  spec.weights = argv[1];
  if (argc == 5) spec.implementation = argv[4];
  attn::LayerRef layer;
  layer.layer = static_cast<std::uint32_t>(std::atoi(argv[2]));
  const std::unique_ptr<attn::AttentionModule> module =
      OrExit(attn::CreateAttentionModule(spec, layer, {}));

  const std::vector<float> hidden = ReadFloats();
  const std::int64_t hidden_size = std::atoi(argv[3]);
  const auto tokens = static_cast<std::int64_t>(hidden.size()) / hidden_size;
  std::vector<float> output(hidden.size());
  // Views: the module owns none of the tensors that it reads and writes.
  attn::ForwardInputs inputs;
  inputs.hidden_states =
      attn::TensorView(hidden.data(), attn::DType::kFloat32, {1, tokens, hidden_size});
  attn::ForwardOutputs outputs;
  outputs.output =
      attn::MutableTensorView(output.data(), attn::DType::kFloat32, {1, tokens, hidden_size});
  // Checks the call, and says what else it would return and the memory that it takes.
  const attn::ForwardPlan plan = OrExit(module->Plan(inputs));

  attn::Executor::Options cores;
  cores.threads = 2;
  const std::unique_ptr<attn::Device> device = attn::CreateCpuDevice(cores);
  attn::Workspace workspace(*device, std::size_t{1} << 30, std::size_t{64} << 20);
  absl::Status status;
  device->executor().Run([&] {  // the one thread that computes, with its workers
    workspace.Reset();          // before every execution
    attn::ExecutionContext context{*device, workspace};
    status = module->Forward(inputs, outputs, context);
  });
  if (!status.ok()) return std::fprintf(stderr, "%s\n", status.ToString().c_str()), 1;
  std::printf("heads %lld\n", static_cast<long long>(plan.shape.num_heads));
  std::printf("workspace %zu of at most %llu bytes\n", workspace.meter().peak(),
              static_cast<unsigned long long>(module->MemoryUsage(plan.shape, 2).bytes));
  std::printf("checksum %.9g\n", Checksum(output.data(), tokens * hidden_size));
}
