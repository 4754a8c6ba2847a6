// Reads a model as model hubs lay it out: a directory with config.json and one or several
// *.safetensors. A family is one row of a table: which config fields shape its attention, which of
// them are supported with which values, and what its tensors are called. A family or a value that
// changes attention and is not supported is UNIMPLEMENTED (reason UNSUPPORTED_MODEL), naming it; a
// broken directory, a needed field or tensor that is missing or has the wrong type or shape is
// INVALID_ARGUMENT (reason BAD_MODEL_DIRECTORY), naming it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/layer_weights.h"
#include "core/model_spec.h"

namespace attn {

struct LoadedStack {
  std::vector<LayerWeights> self_attention;  // one per layer, in order
  std::vector<LayerWeights> cross_attention;
};

struct LoadedModel {
  ModelSpec spec;                   // stacks, modality and dtype filled in
  std::vector<LoadedStack> stacks;  // parallel to spec.stacks
};

// Runs one slice of the conversion (at most a few MiB of copying); the server gives a runner that
// lets requests in between slices. The default runs it at once.
using SliceRunner = std::function<absl::Status(const std::function<void()>&)>;

struct LoadOptions {
  std::string model_root;  // `spec.weights` is resolved under it; absolute paths, "..", and links
                           // that leave it are refused (INVALID_ARGUMENT, reason BAD_PATH). Empty:
                           // spec.weights is a path of the operator's
  SliceRunner run_slice;
};

// Fills `spec` from the directory and loads every attention layer, converted to spec.dtype (unset:
// the checkpoint's). Fields that the caller did set must agree with the directory: otherwise
// INVALID_ARGUMENT with field, value, rule.
absl::StatusOr<LoadedModel> LoadModelDirectory(const ModelSpec& spec, const LoadOptions& options);

}  // namespace attn
