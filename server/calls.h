// The data plane's requests and answers as handlers see them: plain structs with views, no
// protobuf.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/attention_module.h"
#include "core/attention_problem.h"
#include "core/cache_call.h"
#include "core/hosted_model.h"
#include "core/model_spec.h"

namespace attn::server {

struct ExecutionRequest {
  std::string implementation;  // empty: the active one
  SparsityOptions sparsity;
  std::int32_t priority = 0;
};

// The API's SessionBatch: one session per batch row.
struct SessionBatch {
  std::vector<std::string> ids;
  CacheRequest request;
};

struct AttendCall {
  LayerRef layer;  // empty model: none
  AttendInputs inputs;
  std::optional<SessionBatch> sessions;
  ExecutionRequest execution;
  std::shared_ptr<const void> storage;  // keeps the bytes behind the views
};

struct ForwardCall {
  LayerRef layer;
  ForwardInputs inputs;
  std::optional<SessionBatch> sessions;
  ExecutionRequest execution;
  std::shared_ptr<const void> storage;
};

// The facts of one execution (the API's Execution message).
struct ExecutionFacts {
  std::string implementation;
  std::string backend;
  std::string reason;
  double queue_seconds = 0.0;
  double compute_seconds = 0.0;
  std::uint64_t peak_workspace_bytes = 0;
  std::uint64_t packed_input_bytes = 0;
  std::uint64_t flops = 0;
  std::optional<SparsityReport> sparsity;  // of approximate implementations
};

// An answer's tensor, in the memory that it is sent from.
struct OutputTensor {
  MutableTensorView view;  // undefined: not asked for
  Buffer buffer;
};

struct AttentionAnswer {
  OutputTensor output;
  OutputTensor attention_weights;
  OutputTensor lse;  // of Attend
  OutputTensor present_key;
  OutputTensor present_value;
  std::vector<std::int64_t> cache_length;  // of each session, after the call
  ExecutionFacts execution;
};

}  // namespace attn::server
