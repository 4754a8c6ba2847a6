// A model's directory as files: where it lies under the model root, which safetensors belong to it,
// and which tensors they hold. Nothing here knows what a tensor is for.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "core/safetensors.h"

namespace attn {

// A directory, and the root that its files may not lie outside of. Both are canonical (no links, no
// "..").
class ModelFiles {
 public:
  // Resolves `weights` under `model_root`. Absolute paths, "..", and links that leave the root are
  // INVALID_ARGUMENT (reason BAD_PATH); what is missing or no directory is INVALID_ARGUMENT (reason
  // BAD_MODEL_DIRECTORY). With an empty root, `weights` is any path, and links may lead anywhere.
  static absl::StatusOr<ModelFiles> Resolve(const std::string& model_root,
                                            const std::string& weights);

  // A file of the directory. `name` has no separator; its target may lie anywhere under the root.
  absl::StatusOr<std::string> PathOf(const std::string& name) const;
  absl::StatusOr<std::string> Read(const std::string& name, std::size_t max_bytes) const;

  // Those that model.safetensors.index.json names, where there is one, else every *.safetensors; in
  // order of name.
  absl::StatusOr<std::vector<std::string>> WeightFiles() const;

 private:
  ModelFiles(std::string root, std::string directory)
      : root_(std::move(root)), directory_(std::move(directory)) {}

  absl::StatusOr<std::vector<std::string>> IndexedFiles() const;
  absl::StatusOr<std::vector<std::string>> ListedFiles() const;

  std::string root_;  // empty: none
  std::string directory_;
};

// All tensors of a model, mapped. Entries are valid while this lives.
class ModelTensors {
 public:
  // A tensor in two files is INVALID_ARGUMENT.
  static absl::StatusOr<ModelTensors> Open(const ModelFiles& files);

  // Null where there is none.
  const SafetensorsEntry* Find(const std::string& name) const;

 private:
  ModelTensors() = default;

  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::unordered_map<std::string_view, const SafetensorsEntry*> entries_;
};

}  // namespace attn
