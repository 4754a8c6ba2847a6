// Attention for programs that link core: a ModelSpec in, a ready module out, without a server.
#pragma once

#include <memory>
#include <string>

#include "core/attention_module.h"
#include "core/hosted_model.h"

namespace attn {

struct FactoryOptions {
  std::string model_root;  // as LoadOptions::model_root
  ImplementationTable table = BuiltInImplementations();
  std::int64_t max_tokens = std::int64_t{1} << 22;
};

// The layer that `layer` names (its model is ignored), around spec.implementation; "auto" takes the
// first row of the table that can serve it. The module keeps what it needs of the model alive.
// Fails as HostedModel::Create, Find and RequireImplementation do; a spec without weights is
// FAILED_PRECONDITION.
absl::StatusOr<std::unique_ptr<AttentionModule>> CreateAttentionModule(
    const ModelSpec& spec, const LayerRef& layer, const FactoryOptions& options);

// The same for a model that is in memory: all modules that are made of it share its parameters.
absl::StatusOr<std::unique_ptr<AttentionModule>> CreateAttentionModule(
    std::shared_ptr<const HostedModel> model, const LayerRef& layer, const FactoryOptions& options);

}  // namespace attn
