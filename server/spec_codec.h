// The API's messages that hold no tensors, as core's plain structs, and back.
#pragma once

#include "absl/status/statusor.h"
#include "attention/v1/admin.pb.h"
#include "attention/v1/types.pb.h"
#include "core/model_spec.h"

namespace attn::server {

// kUnspecified for unset and for values that this server does not know.
DType FromProto(attention::v1::DataType dtype);
attention::v1::DataType ToProto(DType dtype);

AttentionOptions FromProto(const attention::v1::AttentionOptions& options);
SparsityOptions FromProto(const attention::v1::SparsityOptions& options);

// INVALID_ARGUMENT where an enum or a number is none that a spec can have.
absl::StatusOr<ModelSpec> FromProto(const attention::v1::ModelSpec& spec);
attention::v1::ModelSpec ToProto(const ModelSpec& spec);

}  // namespace attn::server
