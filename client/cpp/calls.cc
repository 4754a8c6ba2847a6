#include "client/cpp/calls.h"

#include <utility>

namespace attn::client {
namespace {

namespace v1 = attention::v1;

using LengthField = google::protobuf::RepeatedField<int64_t>;

void Set(LengthField* field, const std::vector<int64_t>& values) {
  field->Assign(values.begin(), values.end());
}

v1::PerHeadValues PerHead(const std::vector<float>& values) {
  v1::PerHeadValues message;
  message.mutable_values()->Assign(values.begin(), values.end());
  return message;
}

v1::AttentionOptions ToProto(const AttentionSettings& settings) {
  v1::AttentionOptions options;
  if (settings.scale) options.set_scale(*settings.scale);
  if (settings.is_causal) options.set_is_causal(*settings.is_causal);
  if (settings.window_left) options.set_window_left(*settings.window_left);
  if (settings.window_right) options.set_window_right(*settings.window_right);
  if (settings.soft_cap) options.set_soft_cap(*settings.soft_cap);
  if (settings.alibi_slopes) *options.mutable_alibi_slopes() = PerHead(*settings.alibi_slopes);
  if (settings.sink_logits) *options.mutable_sink_logits() = PerHead(*settings.sink_logits);
  return options;
}

v1::ExecutionOptions ToProto(const ExecutionSettings& settings) {
  v1::ExecutionOptions options;
  options.set_implementation(settings.implementation);
  options.set_priority(settings.priority);
  if (settings.sparsity_factor) options.mutable_sparsity()->set_factor(*settings.sparsity_factor);
  if (settings.sparsity_mass) options.mutable_sparsity()->set_mass(*settings.sparsity_mass);
  return options;
}

v1::LayerRef ToProto(const std::string& model, const Layer& layer) {
  v1::LayerRef ref;
  ref.set_model(model);
  ref.set_stack(layer.stack);
  ref.set_layer(layer.index);
  if (layer.cross) ref.set_kind(v1::ATTENTION_KIND_CROSS);
  return ref;
}

// An absent tensor leaves its field unset.
template <typename Request>
void Set(v1::Tensor* (Request::*field)(), Request& request, Tensor tensor) {
  if (tensor.dtype != v1::DATA_TYPE_UNSPECIFIED) *(request.*field)() = ToProto(std::move(tensor));
}

// What requests of both kinds have under the same names.
template <typename Request, typename Call>
void SetCommon(Request& request, const std::string& model, Call& call) {
  *request.mutable_layer() = ToProto(model, call.layer);
  Set(request.mutable_query_lengths(), call.query_lengths);
  Set(request.mutable_kv_lengths(), call.kv_lengths);
  Set(&Request::mutable_attention_mask, request, std::move(call.attention_mask));
  *request.mutable_options() = ToProto(call.attention);
  *request.mutable_execution() = ToProto(call.execution);
  request.set_output_attentions(call.output_attentions);
}

template <typename Result, typename Response>
Result CommonResult(Response& response) {
  Result result;
  result.output = FromProto(std::move(*response.mutable_output()));
  result.attention_weights = FromProto(std::move(*response.mutable_attention_weights()));
  result.cache_length.assign(response.cache_length().begin(), response.cache_length().end());
  result.execution = std::move(*response.mutable_execution());
  return result;
}

}  // namespace

v1::ForwardRequest ToRequest(const std::string& model, ForwardCall call) {
  v1::ForwardRequest request;
  SetCommon(request, model, call);
  Set(&v1::ForwardRequest::mutable_hidden_states, request, std::move(call.hidden_states));
  Set(&v1::ForwardRequest::mutable_encoder_hidden_states, request,
      std::move(call.encoder_hidden_states));
  Set(&v1::ForwardRequest::mutable_position_ids, request, std::move(call.position_ids));
  return request;
}

v1::AttendRequest ToRequest(const std::string& model, AttendCall call) {
  v1::AttendRequest request;
  SetCommon(request, model, call);
  request.set_tensor_layout(call.tensor_layout);
  Set(&v1::AttendRequest::mutable_query, request, std::move(call.query));
  Set(&v1::AttendRequest::mutable_key, request, std::move(call.key));
  Set(&v1::AttendRequest::mutable_value, request, std::move(call.value));
  Set(request.mutable_first_query_position(), call.first_query_position);
  request.set_attention_stage(call.attention_stage);
  request.set_output_lse(call.output_lse);
  request.set_output_dtype(call.output_dtype);
  return request;
}

ForwardResult ToResult(v1::ForwardResponse response) {
  return CommonResult<ForwardResult>(response);
}

AttendResult ToResult(v1::AttendResponse response) {
  AttendResult result = CommonResult<AttendResult>(response);
  result.lse = FromProto(std::move(*response.mutable_lse()));
  return result;
}

}  // namespace attn::client
