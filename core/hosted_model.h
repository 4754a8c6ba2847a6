// A model as the server holds it: its complete spec and its layers' parameters, immutable and
// shared by everything that executes on it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/attention_implementation.h"
#include "core/layer_weights.h"
#include "core/model_directory.h"
#include "core/model_spec.h"
#include "core/rotary.h"

namespace attn {

struct LayerRef {
  std::string model;
  std::string stack;  // empty: the model's only one
  std::uint32_t layer = 0;
  AttentionKind kind = AttentionKind::kSelf;
};

// What a layer works on: for cross-attention, whose keys come from elsewhere, multimodal; otherwise
// what its stack says, or else its model. kUnspecified where nothing says it, and for a stack that
// does not exist.
Modality ModalityOf(const ModelSpec& spec, const LayerRef& ref);

// One layer with what its stack and model say about it.
struct HostedLayer {
  std::shared_ptr<const LayerSpec> spec;  // shared by the layers of a run
  AttentionKind kind = AttentionKind::kSelf;
  std::int64_t hidden_size = 0;
  std::int64_t max_positions = 0;  // 0: no limit
  DType dtype = DType::kFloat32;
  std::shared_ptr<const LayerWeights> weights;  // null: attention only
  std::shared_ptr<const Rotary> rotary;         // null: none; shared by the layers of a run
};

// The plainest request that a layer gets: an implementation that can't serve it can't serve the
// model.
AttentionShape PlainShape(const HostedLayer& layer);

// FAILED_PRECONDITION where the model was loaded without weights: it serves Attend, not Forward.
absl::Status RequireWeights(const HostedLayer& layer, const std::string& model);

// OK for what a session's cache can be kept in (int8 beside what tensors have), and where it is
// unspecified; INVALID_ARGUMENT for the rest.
absl::Status CheckCacheDType(const std::string& field, DType dtype);

class HostedModel {
 public:
  // Completes and checks `spec` (INVALID_ARGUMENT naming the field), loading weights where it names
  // a directory.
  static absl::StatusOr<std::shared_ptr<const HostedModel>> Create(const ModelSpec& spec,
                                                                   const LoadOptions& options);

  const ModelSpec& spec() const { return spec_; }
  std::uint64_t weight_bytes() const { return weight_bytes_; }

  // NOT_FOUND where the stack or the layer does not exist. Valid as long as the model.
  absl::StatusOr<const HostedLayer*> Find(const LayerRef& ref) const;

  // Every layer of every stack, for checks that hold for the whole model.
  std::vector<const HostedLayer*> Layers() const;

 private:
  struct Stack {
    std::string name;
    std::vector<HostedLayer> self_attention;
    std::vector<HostedLayer> cross_attention;
  };

  ModelSpec spec_;
  std::vector<Stack> stacks_;
  std::uint64_t weight_bytes_ = 0;
};

}  // namespace attn
