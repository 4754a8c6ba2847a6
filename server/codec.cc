#include "server/codec.h"

#include <google/protobuf/io/coded_stream.h>

#include "absl/strings/str_cat.h"
#include "attention/v1/attention.pb.h"
#include "core/error.h"
#include "server/spec_codec.h"
#include "server/wire_limits.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

absl::Status NotYet(const char* reason, const std::string& what) {
  return MakeError(absl::StatusCode::kUnimplemented, reason,
                   absl::StrCat(what, " is not supported by this server"));
}

}  // namespace

absl::StatusOr<TensorView> ReadTensor(const char* field, bool set, const proto::Tensor& tensor) {
  if (!set) return TensorView();
  if (tensor.has_shared_memory())
    return NotYet("SHARED_MEMORY_OFF", absl::StrCat(field, " in shared memory"));
  const DType dtype = FromProto(tensor.dtype());
  if (dtype == DType::kUnspecified || dtype == DType::kInt8) {
    return InvalidField(field, absl::StrCat(field, " has dtype ", static_cast<int>(tensor.dtype()),
                                            ", which no tensor of a request can have"));
  }
  if (tensor.shape_size() > kMaxRank) {
    return InvalidField(
        field, absl::StrCat(field, " has rank ", tensor.shape_size(), ", more than ", kMaxRank));
  }
  // All products are checked before any of them is used: strides of a tensor without elements must
  // not overflow either.
  std::int64_t bytes = static_cast<std::int64_t>(ItemSize(dtype));
  std::int64_t extents = bytes;
  for (std::int64_t extent : tensor.shape()) {
    if (extent < 0 ||
        __builtin_mul_overflow(extents, std::max<std::int64_t>(extent, 1), &extents)) {
      return InvalidField(field,
                          absl::StrCat(field, " has a dimension of ", extent,
                                       extent < 0 ? ", which is negative" : ": too many bytes"));
    }
    bytes *= extent;
  }
  if (static_cast<std::uint64_t>(bytes) != tensor.data().size()) {
    return InvalidField(field, absl::StrCat(field, " has ", tensor.data().size(),
                                            " bytes, but its shape and dtype need ", bytes));
  }
  return TensorView(tensor.data().data(), dtype, tensor.shape().data(), tensor.shape_size());
}

namespace {

absl::Status CheckNoSlots(bool set) {
  return set ? NotYet("SHARED_MEMORY_OFF", "results in shared memory") : absl::OkStatus();
}

}  // namespace

absl::StatusOr<LayerRef> ReadLayer(const proto::LayerRef& layer) {
  LayerRef ref;
  ref.model = layer.model();
  ref.stack = layer.stack();
  ref.layer = layer.layer();
  switch (layer.kind()) {
    case proto::ATTENTION_KIND_UNSPECIFIED:
    case proto::ATTENTION_KIND_SELF:
      ref.kind = AttentionKind::kSelf;
      break;
    case proto::ATTENTION_KIND_CROSS:
      ref.kind = AttentionKind::kCross;
      break;
    default:
      return InvalidField("layer.kind",
                          absl::StrCat("layer.kind is ", static_cast<int>(layer.kind()),
                                       ", which is no attention kind"));
  }
  return ref;
}

namespace {

ExecutionRequest ReadExecution(const proto::ExecutionOptions& options) {
  return {options.implementation(), FromProto(options.sparsity()), options.priority()};
}

std::vector<std::int64_t> ReadIntegers(
    const google::protobuf::RepeatedField<std::int64_t>& values) {
  return {values.begin(), values.end()};
}

absl::StatusOr<SessionBatch> ReadSessions(const proto::SessionBatch& sessions) {
  SessionBatch batch;
  batch.ids = {sessions.session_ids().begin(), sessions.session_ids().end()};
  switch (sessions.mode()) {
    case proto::CACHE_MODE_UNSPECIFIED:
    case proto::CACHE_MODE_APPEND:
      batch.request.mode = CacheMode::kAppend;
      break;
    case proto::CACHE_MODE_READ_ONLY:
      batch.request.mode = CacheMode::kReadOnly;
      break;
    case proto::CACHE_MODE_DISCARD:
      batch.request.mode = CacheMode::kDiscard;
      break;
    default:
      return InvalidField("past_key_value.sessions.mode",
                          absl::StrCat("past_key_value.sessions.mode is ",
                                       static_cast<int>(sessions.mode()), ", which is no mode"));
  }
  batch.request.truncate = ReadIntegers(sessions.truncate());
  batch.request.cache_position = ReadIntegers(sessions.cache_position());
  batch.request.step = {sessions.step().begin(), sessions.step().end()};
  return batch;
}

absl::Status ReadPast(const proto::PastKeyValue& past, std::optional<SessionBatch>& sessions,
                      TensorView& key, TensorView& value) {
  if (past.has_sessions()) {
    ATTN_ASSIGN_OR_RETURN(sessions, ReadSessions(past.sessions()));
    return absl::OkStatus();
  }
  if (!past.has_inline_kv()) return absl::OkStatus();
  const proto::KeyValue& carried = past.inline_kv();
  ATTN_ASSIGN_OR_RETURN(
      key, ReadTensor("past_key_value.inline_kv.key", carried.has_key(), carried.key()));
  ATTN_ASSIGN_OR_RETURN(
      value, ReadTensor("past_key_value.inline_kv.value", carried.has_value(), carried.value()));
  if (key.defined() != value.defined()) {
    return InvalidField("past_key_value.inline_kv",
                        "past_key_value.inline_kv needs both key and value");
  }
  return absl::OkStatus();
}

absl::StatusOr<TensorLayout> ReadLayout(proto::TensorLayout layout) {
  switch (layout) {
    case proto::TENSOR_LAYOUT_UNSPECIFIED:
    case proto::TENSOR_LAYOUT_HEADS_FIRST:
      return TensorLayout::kHeadsFirst;
    case proto::TENSOR_LAYOUT_TOKENS_FIRST:
      return TensorLayout::kTokensFirst;
    case proto::TENSOR_LAYOUT_PACKED:
      return TensorLayout::kPacked;
    default:
      return InvalidField(
          "tensor_layout",
          absl::StrCat("tensor_layout is ", static_cast<int>(layout), ", which is no layout"));
  }
}

absl::StatusOr<kernels::ScoreStage> ReadStage(const proto::AttendRequest& request) {
  if (!request.output_attentions()) return kernels::ScoreStage::kNone;
  switch (request.attention_stage()) {
    case proto::SCORE_STAGE_SCALED:
      return kernels::ScoreStage::kScaled;
    case proto::SCORE_STAGE_SOFT_CAPPED:
      return kernels::ScoreStage::kSoftCapped;
    case proto::SCORE_STAGE_MASKED:
      return kernels::ScoreStage::kMasked;
    case proto::SCORE_STAGE_UNSPECIFIED:
    case proto::SCORE_STAGE_PROBABILITIES:
      return kernels::ScoreStage::kProbabilities;
    default:
      return InvalidField(
          "attention_stage",
          absl::StrCat("attention_stage is ", static_cast<int>(request.attention_stage()),
                       ", which is no stage"));
  }
}

// A Tensor message's bytes before its data, the data being its last field.
std::string TensorHeader(const OutputTensor& tensor) {
  proto::Tensor header;
  header.set_dtype(ToProto(tensor.view.dtype));
  for (int i = 0; i < tensor.view.rank; ++i) header.add_shape(tensor.view.extent(i));
  std::string bytes = header.SerializeAsString();
  if (tensor.buffer.bytes > 0)
    AppendLengthHeader(proto::Tensor::kDataFieldNumber, tensor.buffer.bytes, bytes);
  return bytes;
}

// Collects pieces: headers grow until a tensor's memory follows them.
class AnswerWriter {
 public:
  void AddTensor(int field, const OutputTensor& tensor) {
    if (!tensor.view.defined()) return;
    const std::string header = TensorHeader(tensor);
    AppendLengthHeader(field, header.size() + tensor.buffer.bytes, pending_);
    AddTensorBytes(header, tensor);
  }

  // A KeyValue message.
  void AddKeyValue(int field, const OutputTensor& key, const OutputTensor& value) {
    if (!key.view.defined()) return;
    const std::string key_header = TensorHeader(key);
    const std::string value_header = TensorHeader(value);
    const std::uint64_t key_bytes = key_header.size() + key.buffer.bytes;
    const std::uint64_t value_bytes = value_header.size() + value.buffer.bytes;
    std::string key_length;
    std::string value_length;
    AppendLengthHeader(proto::KeyValue::kKeyFieldNumber, key_bytes, key_length);
    AppendLengthHeader(proto::KeyValue::kValueFieldNumber, value_bytes, value_length);
    AppendLengthHeader(field, key_length.size() + key_bytes + value_length.size() + value_bytes,
                       pending_);
    pending_ += key_length;
    AddTensorBytes(key_header, key);
    pending_ += value_length;
    AddTensorBytes(value_header, value);
  }

  // The remaining fields, and the end.
  Answer Finish(const google::protobuf::Message& rest) {
    pending_ += rest.SerializeAsString();
    if (!pending_.empty()) answer_.pieces.push_back({std::move(pending_), {}});
    return std::move(answer_);
  }

 private:
  void AddTensorBytes(const std::string& header, const OutputTensor& tensor) {
    pending_ += header;
    if (tensor.buffer.bytes == 0) return;
    answer_.pieces.push_back({std::move(pending_), {}});
    pending_.clear();
    answer_.pieces.push_back({{}, tensor.buffer});
  }

  Answer answer_;
  std::string pending_;
};

void WriteExecution(const ExecutionFacts& facts, proto::Execution& execution) {
  execution.set_implementation(facts.implementation);
  execution.set_backend(facts.backend);
  execution.set_reason(facts.reason);
  execution.set_queue_seconds(facts.queue_seconds);
  execution.set_compute_seconds(facts.compute_seconds);
  execution.set_peak_workspace_bytes(facts.peak_workspace_bytes);
  execution.set_packed_input_bytes(facts.packed_input_bytes);
  execution.set_flops(facts.flops);
  if (facts.sparsity) {
    execution.set_sparsity(facts.sparsity->sparsity);
    execution.set_recovered_mass(facts.sparsity->recovered_mass);
  }
  execution.set_batched_requests(1);
}

}  // namespace

void AppendLengthHeader(int field, std::uint64_t length, std::string& out) {
  constexpr std::uint32_t kLengthDelimited = 2;
  std::uint8_t bytes[16];
  std::uint8_t* end = google::protobuf::io::CodedOutputStream::WriteTagToArray(
      static_cast<std::uint32_t>(field) << 3 | kLengthDelimited, bytes);
  end = google::protobuf::io::CodedOutputStream::WriteVarint64ToArray(length, end);
  out.append(reinterpret_cast<const char*>(bytes), static_cast<std::size_t>(end - bytes));
}

absl::Status ParseMessage(const RequestBytes& bytes, google::protobuf::Message& message) {
  ATTN_RETURN_IF_ERROR(CheckWire(*bytes.open(), *message.GetDescriptor(), WireLimits()));
  if (message.ParseFromZeroCopyStream(bytes.open().get())) return absl::OkStatus();
  return MakeError(absl::StatusCode::kInvalidArgument, "MALFORMED_MESSAGE",
                   "the bytes are not a message of this rpc's request type");
}

absl::StatusOr<AttendCall> DecodeAttend(const RequestBytes& bytes) {
  auto request = std::make_shared<proto::AttendRequest>();
  ATTN_RETURN_IF_ERROR(ParseMessage(bytes, *request));
  ATTN_RETURN_IF_ERROR(CheckNoSlots(request->has_results()));
  AttendCall call;
  AttendInputs& inputs = call.inputs;
  ATTN_ASSIGN_OR_RETURN(call.layer, ReadLayer(request->layer()));
  ATTN_ASSIGN_OR_RETURN(inputs.layout, ReadLayout(request->tensor_layout()));
  inputs.past_layout = inputs.layout;
  ATTN_ASSIGN_OR_RETURN(inputs.query, ReadTensor("query", request->has_query(), request->query()));
  ATTN_RETURN_IF_ERROR(
      ReadPast(request->past_key_value(), call.sessions, inputs.past_key, inputs.past_value));
  ATTN_ASSIGN_OR_RETURN(inputs.key, ReadTensor("key", request->has_key(), request->key()));
  ATTN_ASSIGN_OR_RETURN(inputs.value, ReadTensor("value", request->has_value(), request->value()));
  ATTN_ASSIGN_OR_RETURN(
      inputs.attention_mask,
      ReadTensor("attention_mask", request->has_attention_mask(), request->attention_mask()));
  inputs.query_lengths = ReadIntegers(request->query_lengths());
  inputs.kv_lengths = ReadIntegers(request->kv_lengths());
  if (inputs.past_key.defined() && !inputs.kv_lengths.empty()) {
    return InvalidField("kv_lengths",
                        "kv_lengths can't be used together with past_key_value.inline_kv");
  }
  inputs.first_query_position = ReadIntegers(request->first_query_position());
  inputs.options = FromProto(request->options());
  ATTN_ASSIGN_OR_RETURN(inputs.stage, ReadStage(*request));
  inputs.output_lse = request->output_lse();
  inputs.output_present = request->use_cache() && !call.sessions;
  if (request->output_dtype() != proto::DATA_TYPE_UNSPECIFIED) {
    inputs.output_dtype = FromProto(request->output_dtype());
    if (!IsFloating(inputs.output_dtype)) {
      return InvalidField("output_dtype", absl::StrCat("output_dtype is ",
                                                       static_cast<int>(request->output_dtype()),
                                                       ", but must be floating"));
    }
  }
  call.execution = ReadExecution(request->execution());
  call.storage = std::move(request);
  return call;
}

absl::StatusOr<ForwardCall> DecodeForward(const RequestBytes& bytes) {
  auto request = std::make_shared<proto::ForwardRequest>();
  ATTN_RETURN_IF_ERROR(ParseMessage(bytes, *request));
  ATTN_RETURN_IF_ERROR(CheckNoSlots(request->has_results()));
  ForwardCall call;
  ForwardInputs& inputs = call.inputs;
  ATTN_ASSIGN_OR_RETURN(call.layer, ReadLayer(request->layer()));
  ATTN_ASSIGN_OR_RETURN(
      inputs.hidden_states,
      ReadTensor("hidden_states", request->has_hidden_states(), request->hidden_states()));
  ATTN_ASSIGN_OR_RETURN(inputs.encoder_hidden_states,
                        ReadTensor("encoder_hidden_states", request->has_encoder_hidden_states(),
                                   request->encoder_hidden_states()));
  ATTN_ASSIGN_OR_RETURN(
      inputs.attention_mask,
      ReadTensor("attention_mask", request->has_attention_mask(), request->attention_mask()));
  ATTN_ASSIGN_OR_RETURN(inputs.position_ids, ReadTensor("position_ids", request->has_position_ids(),
                                                        request->position_ids()));
  ATTN_RETURN_IF_ERROR(
      ReadPast(request->past_key_value(), call.sessions, inputs.past_key, inputs.past_value));
  inputs.query_lengths = ReadIntegers(request->query_lengths());
  inputs.kv_lengths = ReadIntegers(request->kv_lengths());
  inputs.output_attentions = request->output_attentions();
  inputs.use_cache = request->use_cache() && !call.sessions;
  inputs.options = FromProto(request->options());
  call.execution = ReadExecution(request->execution());
  call.storage = std::move(request);
  return call;
}

Answer EncodeAttend(const AttentionAnswer& answer) {
  using Response = proto::AttendResponse;
  AnswerWriter writer;
  writer.AddTensor(Response::kOutputFieldNumber, answer.output);
  writer.AddTensor(Response::kAttentionWeightsFieldNumber, answer.attention_weights);
  writer.AddTensor(Response::kLseFieldNumber, answer.lse);
  writer.AddKeyValue(Response::kPresentFieldNumber, answer.present_key, answer.present_value);
  Response rest;
  *rest.mutable_cache_length() = {answer.cache_length.begin(), answer.cache_length.end()};
  WriteExecution(answer.execution, *rest.mutable_execution());
  return writer.Finish(rest);
}

Answer EncodeForward(const AttentionAnswer& answer) {
  using Response = proto::ForwardResponse;
  AnswerWriter writer;
  writer.AddTensor(Response::kOutputFieldNumber, answer.output);
  writer.AddTensor(Response::kAttentionWeightsFieldNumber, answer.attention_weights);
  writer.AddKeyValue(Response::kPresentFieldNumber, answer.present_key, answer.present_value);
  Response rest;
  *rest.mutable_cache_length() = {answer.cache_length.begin(), answer.cache_length.end()};
  WriteExecution(answer.execution, *rest.mutable_execution());
  return writer.Finish(rest);
}

Answer EncodeMessage(const google::protobuf::Message& message) {
  return AnswerWriter().Finish(message);
}

}  // namespace attn::server
