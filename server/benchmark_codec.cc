#include "server/benchmark_codec.h"

#include "attention/v1/admin.pb.h"
#include "core/error.h"
#include "server/spec_codec.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

BenchmarkShape ReadShape(const proto::AttentionShape& message) {
  BenchmarkShape shape;
  shape.batch = message.batch();
  shape.q_len = message.q_len();
  shape.kv_len = message.kv_len();
  shape.dtype = FromProto(message.dtype());
  shape.cached = message.cached();
  shape.has_mask = message.has_mask();
  shape.output_attentions = message.output_attentions();
  shape.output_lse = message.output_lse();
  shape.query_lengths = {message.query_lengths().begin(), message.query_lengths().end()};
  shape.kv_lengths = {message.kv_lengths().begin(), message.kv_lengths().end()};
  return shape;
}

}  // namespace

absl::StatusOr<BenchmarkCall> DecodeBenchmark(const RequestBytes& bytes) {
  const auto request = std::make_shared<proto::BenchmarkAttentionRequest>();
  ATTN_RETURN_IF_ERROR(ParseMessage(bytes, *request));
  BenchmarkCall call;
  ATTN_ASSIGN_OR_RETURN(call.layer, ReadLayer(request->layer()));
  if (request->has_shape()) {
    call.shape = ReadShape(request->shape());
  } else if (request->has_hidden_states()) {
    ATTN_ASSIGN_OR_RETURN(call.hidden_states,
                          ReadTensor("hidden_states", true, request->hidden_states()));
  } else {
    return InvalidField("shape", "the request has neither shape nor hidden_states");
  }
  call.implementations = {request->implementations().begin(), request->implementations().end()};
  call.iterations = request->iterations();
  call.max_seconds = request->max_seconds();
  call.max_bytes = request->max_bytes();
  call.storage = request;
  return call;
}

Answer EncodeBenchmarkProgress(const std::string& implementation, double fraction) {
  proto::BenchmarkAttentionResponse response;
  response.mutable_progress()->set_implementation(implementation);
  response.mutable_progress()->set_fraction(fraction);
  return EncodeMessage(response);
}

Answer EncodeBenchmarkResult(const BenchmarkResult& result) {
  proto::BenchmarkAttentionResponse response;
  proto::BenchmarkResult& message = *response.mutable_result();
  message.set_implementation(result.implementation);
  message.set_backend(result.backend);
  message.set_median_seconds(result.median_seconds);
  message.set_min_seconds(result.min_seconds);
  message.set_p95_seconds(result.p95_seconds);
  message.set_peak_workspace_bytes(result.peak_workspace_bytes);
  message.set_flops(result.flops);
  message.set_max_abs_error(result.errors.max_abs);
  message.set_relative_error(result.errors.relative);
  message.set_error(result.error);
  message.set_iterations(result.iterations);
  return EncodeMessage(response);
}

}  // namespace attn::server
