#include "server/select_handlers.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "server/spec_codec.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

absl::StatusOr<LayerRef> LayerOf(const proto::LayerRef& layer) {
  if (layer.model().empty()) {
    return InvalidField(
        "layer.model", "layer.model is missing: heads and dimensions are those of a model's layer");
  }
  LayerRef ref;
  ref.model = layer.model();
  ref.stack = layer.stack();
  ref.layer = layer.layer();
  switch (layer.kind()) {
    case proto::ATTENTION_KIND_UNSPECIFIED:
    case proto::ATTENTION_KIND_SELF:
      return ref;
    case proto::ATTENTION_KIND_CROSS:
      ref.kind = AttentionKind::kCross;
      return ref;
    default:
      return InvalidField("layer.kind", absl::StrCat("layer.kind is ", layer.kind(),
                                                     ", which is no kind of attention"));
  }
}

// `given` for each of the rows; without any, all of `extent`.
absl::StatusOr<std::vector<std::int64_t>> LengthsOf(
    const std::string& field, const google::protobuf::RepeatedField<std::int64_t>& given,
    std::int64_t batch, std::int64_t extent) {
  std::vector<std::int64_t> lengths(given.begin(), given.end());
  if (lengths.empty()) lengths.assign(static_cast<std::size_t>(batch), extent);
  if (static_cast<std::int64_t>(lengths.size()) != batch) {
    return InvalidField(
        field, absl::StrCat(field, " has ", lengths.size(), " entries, but batch is ", batch));
  }
  for (const std::int64_t length : lengths) {
    if (length >= 0 && length <= extent) continue;
    return InvalidField(field,
                        absl::StrCat(field, " has ", length, ", but must be in [0, ", extent, "]"));
  }
  return lengths;
}

absl::Status CheckExtents(const proto::AttentionShape& message, std::int64_t max_tokens) {
  const std::int64_t batch = message.batch();
  if (batch == 0) return InvalidField("shape.batch", "shape.batch must be at least 1");
  for (const auto& [field, value] : {std::pair("shape.q_len", std::int64_t{message.q_len()}),
                                     std::pair("shape.kv_len", std::int64_t{message.kv_len()})}) {
    if (value == 0) return InvalidField(field, absl::StrCat(field, " must be at least 1"));
    if (value > max_tokens || batch * value > max_tokens) {
      return InvalidField(field, absl::StrCat(field, " is ", value, " with a batch of ", batch,
                                              ": more than the limit of ", max_tokens, " tokens"));
    }
  }
  return absl::OkStatus();
}

absl::Status SetDTypes(const proto::AttentionShape& message, const HostedLayer& layer,
                       DType model_cache_dtype, AttentionShape& shape) {
  shape.dtype = layer.dtype;
  if (message.dtype() != proto::DATA_TYPE_UNSPECIFIED) shape.dtype = FromProto(message.dtype());
  if (!IsFloating(shape.dtype)) {
    return InvalidField("shape.dtype", "shape.dtype must be float32, float16 or bfloat16");
  }
  shape.kv_dtype = shape.output_dtype = shape.dtype;
  if (message.cached() && model_cache_dtype != DType::kUnspecified) {
    shape.kv_dtype = model_cache_dtype;
  }
  return absl::OkStatus();
}

// Rows, and what is counted over them.
absl::Status AddRows(const proto::AttentionShape& message, AttentionShape& shape) {
  ATTN_ASSIGN_OR_RETURN(
      const std::vector<std::int64_t> queries,
      LengthsOf("shape.query_lengths", message.query_lengths(), shape.batch, message.q_len()));
  ATTN_ASSIGN_OR_RETURN(
      const std::vector<std::int64_t> keys,
      LengthsOf("shape.kv_lengths", message.kv_lengths(), shape.batch, message.kv_len()));
  for (std::size_t i = 0; i < queries.size(); ++i) {
    shape.rows.push_back({queries[i], keys[i], keys[i] - queries[i]});
    shape.ragged = shape.ragged || queries[i] != queries[0] || keys[i] != keys[0];
    shape.q_len = std::max(shape.q_len, queries[i]);
    shape.kv_len = std::max(shape.kv_len, keys[i]);
  }
  const ShapeProblem problem(shape);  // its sequences are the rows
  for (std::int64_t i = 0; i < problem.args().num_sequences; ++i) {
    const kernels::Sequence& sequence = problem.args().sequences[i];
    const std::int64_t visible = sequence.kv_len - TrimmedKeys(problem.args(), sequence);
    shape.pairs += sequence.q_len * visible;
    shape.longest_pairs = std::max(shape.longest_pairs, sequence.q_len * visible);
    if (shape.paged) shape.paged_tokens += visible;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<AttentionShape> ShapeOfMessage(const proto::AttentionShape& message,
                                              const HostedLayer& layer, DType model_cache_dtype,
                                              std::int64_t max_tokens) {
  ATTN_RETURN_IF_ERROR(CheckExtents(message, max_tokens));
  AttentionShape shape = PlainShape(layer);
  ATTN_RETURN_IF_ERROR(SetDTypes(message, layer, model_cache_dtype, shape));
  const AttentionOptions& options = layer.spec->options;
  shape.window_left = options.window_left.value_or(-1);
  shape.window_right = options.window_right.value_or(-1);
  shape.batch = message.batch();
  shape.q_len = shape.kv_len = shape.pairs = shape.longest_pairs = 0;
  shape.paged = message.cached();
  shape.output_lse = message.output_lse();
  if (message.output_attentions()) shape.stage = kernels::ScoreStage::kProbabilities;
  if (message.has_mask()) {
    shape.mask = kernels::MaskType::kBool;
    shape.mask_extent = message.kv_len();
  }
  ATTN_RETURN_IF_ERROR(AddRows(message, shape));
  return shape;
}

absl::Status HandleSelectAttention(ServerState& state, const proto::SelectAttentionRequest& request,
                                   proto::SelectAttentionResponse& response) {
  ATTN_ASSIGN_OR_RETURN(const LayerRef ref, LayerOf(request.layer()));
  ATTN_ASSIGN_OR_RETURN(const std::shared_ptr<ManagerPool> pool, state.registry().Find(ref.model));
  ATTN_ASSIGN_OR_RETURN(const HostedLayer* const layer, pool->model()->Find(ref));
  const ModelSpec& spec = pool->model()->spec();
  ATTN_ASSIGN_OR_RETURN(
      AttentionShape shape,
      ShapeOfMessage(request.shape(), *layer, spec.cache_dtype, state.limits().max_tokens));
  shape.sparsity = spec.sparsity;
  const Selector& selector = *pool->managers().front()->selector();
  SelectionRequest automatic;
  automatic.allow_approximate = spec.allow_approximate;
  const absl::StatusOr<Selection> selection = selector.Select(automatic, shape);
  for (const Candidate& candidate : selector.Candidates(shape, spec.allow_approximate)) {
    proto::Candidate& message = *response.add_candidates();
    message.set_implementation(candidate.row->name);
    message.set_eligible(candidate.eligible);
    message.set_reason(candidate.reason);
    message.set_estimated_seconds(candidate.estimated_seconds);
    message.set_workspace_bytes(candidate.workspace_bytes);
    message.set_flops(candidate.operations);
  }
  // That none can is an answer too: the candidates say why.
  if (selection.ok()) response.set_implementation(selection->row->name);
  response.set_reason(selection.ok() ? selection->reason
                                     : std::string(selection.status().message()));
  return absl::OkStatus();
}

}  // namespace attn::server
