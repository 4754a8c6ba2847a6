// BenchmarkAttention's request as a plain call, and its events as answers. Without gRPC.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/attention_benchmark.h"
#include "server/answer.h"
#include "server/codec.h"

namespace attn::server {

struct BenchmarkCall {
  LayerRef layer;
  std::optional<BenchmarkShape> shape;
  TensorView hidden_states;  // where `shape` is not set
  std::vector<std::string> implementations;
  std::uint32_t iterations = 0;
  double max_seconds = 0.0;
  std::uint64_t max_bytes = 0;
  std::shared_ptr<const void> storage;  // keeps the bytes behind the view
};

// INVALID_ARGUMENT with the field.
absl::StatusOr<BenchmarkCall> DecodeBenchmark(const RequestBytes& bytes);

Answer EncodeBenchmarkProgress(const std::string& implementation, double fraction);
Answer EncodeBenchmarkResult(const BenchmarkResult& result);

}  // namespace attn::server
