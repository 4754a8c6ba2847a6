// From tensors by name to the layers that attention runs: finds each projection under the names its
// family gives it, checks every shape before anything is allocated, then converts and concatenates
// in slices.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "core/families/family.h"
#include "core/layer_weights.h"
#include "core/model_directory.h"
#include "core/model_files.h"
#include "core/model_spec.h"

namespace attn {

// A parameter as parts that follow each other along the first axis. A part without an entry is
// zeros (a bias that one of three fused projections does not have).
struct PlannedParameter {
  struct Part {
    const SafetensorsEntry* entry;
    std::int64_t elements;
  };
  std::vector<Part> parts;  // empty: the layer has no such parameter
  std::vector<std::int64_t> shape;
};

struct PlannedLayer {
  PlannedParameter query_key_value_weight;
  PlannedParameter query_key_value_bias;
  PlannedParameter key_value_weight;  // of cross-attention; query_key_value is the query's then
  PlannedParameter key_value_bias;
  PlannedParameter output_weight;
  PlannedParameter output_bias;
  PlannedParameter query_norm;
  PlannedParameter key_norm;
  float norm_epsilon = 0.0f;
  float norm_offset = 0.0f;
  PlannedParameter sinks;
};

// The stack's self-attention layers. A tensor that is missing, has another shape than the spec, or
// should not be there is INVALID_ARGUMENT (reason BAD_MODEL_DIRECTORY, details "tensor"); one in a
// dtype other than float32, float16 and bfloat16 is UNIMPLEMENTED (reason UNSUPPORTED_MODEL).
absl::StatusOr<std::vector<PlannedLayer>> PlanSelfAttention(const ModelTensors& tensors,
                                                            const LayerStack& stack,
                                                            const StackTensors& names);

// The same of its cross-attention layers, whose keys and values are projected from an encoder's
// hidden states.
absl::StatusOr<std::vector<PlannedLayer>> PlanCrossAttention(const ModelTensors& tensors,
                                                             const LayerStack& stack,
                                                             const StackTensors& names);

// Gives each self-attention layer of the stack the sink logits of its plan: layers that have some
// become runs of their own.
void ReadSinks(const std::vector<PlannedLayer>& layers, LayerStack& stack);

// The dtype that all parts of projections have; float32, which holds both others exactly, where
// they differ.
DType StoredDType(const std::vector<PlannedLayer>& layers);

// Allocates and converts one layer. `run_slice` runs each piece of at most 1 MiB and may refuse to
// go on. No memory: RESOURCE_EXHAUSTED.
absl::StatusOr<LayerWeights> LoadLayer(const PlannedLayer& plan, DType dtype,
                                       const SliceRunner& run_slice);

}  // namespace attn
