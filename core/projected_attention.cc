#include "core/projected_attention.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "core/cache_append.h"
#include "core/cache_call.h"
#include "core/error.h"
#include "core/position_encoding.h"
#include "core/torch_support.h"

namespace attn {
namespace {

at::Tensor AsTensor(const Parameter& parameter) {
  return AsTensor(TensorView(parameter.data.get(), parameter.dtype, parameter.shape.data(),
                             static_cast<int>(parameter.shape.size())));
}

// Whether the call projects keys and values beside its queries.
bool BringsKeys(const ForwardInputs& inputs) {
  return inputs.cache == nullptr || inputs.cache->rows().mode != CacheMode::kReadOnly;
}

// Whether they are projected from its own hidden states, beside the queries.
bool OwnKeys(const HostedLayer& layer, const ForwardInputs& inputs) {
  return layer.kind == AttentionKind::kSelf && BringsKeys(inputs);
}

TensorLayout LayoutOf(const TokenRows& rows) {
  return rows.packed ? TensorLayout::kPacked : TensorLayout::kTokensFirst;
}

// Hands out the parts of projected rows as they lie one behind the other in each row.
class RowParts {
 public:
  // `data` is null while planning.
  RowParts(const TokenRows& rows, DType dtype, std::int64_t row_size, const void* data)
      : rows_(rows), dtype_(dtype), row_size_(row_size), data_(static_cast<const char*>(data)) {}

  TensorView Next(std::int64_t heads, std::int64_t dim) {
    TensorView view;
    view.dtype = dtype_;
    if (data_ != nullptr) {
      view.data = data_ + offset_ * static_cast<std::int64_t>(ItemSize(dtype_));
    }
    if (rows_.packed) {
      view.rank = 3;
      view.extents = {rows_.count, heads, dim};
      view.strides = {row_size_, dim, 1};
    } else {
      view.rank = 4;
      view.extents = {rows_.batch, rows_.length, heads, dim};
      view.strides = {rows_.length * row_size_, row_size_, dim, 1};
    }
    offset_ += heads * dim;
    return view;
  }

 private:
  const TokenRows& rows_;
  const DType dtype_;
  const std::int64_t row_size_;
  const char* const data_;
  std::int64_t offset_ = 0;  // elements
};

// out = x W^T + b, written where `out` lies: of the first features, where it has fewer.
void Project(at::Tensor out, const at::Tensor& x, const Projection& projection) {
  const at::Tensor weight = AsTensor(projection.weight).narrow(0, 0, out.size(1)).t();
  if (projection.bias.defined()) {
    at::addmm_out(out, AsTensor(projection.bias).narrow(0, 0, out.size(1)), x, weight);
  } else {
    at::mm_out(out, x, weight);
  }
}

// RMS norm over the last dimension, in float32, in place: x / sqrt(mean(x^2) + epsilon) * weight.
void NormalizeHeads(at::Tensor heads, const Parameter& weight, float epsilon) {
  if (!weight.defined()) return;
  const at::Tensor x = heads.to(c10::ScalarType::Float);
  const at::Tensor scale = x.pow(2).mean(-1, true).add_(epsilon).rsqrt_();
  const at::Tensor gain = AsTensor(weight);
  heads.copy_(x.mul(scale).to(gain.scalar_type()).mul(gain));
}

}  // namespace

std::int64_t ProjectedAttention::query_size() const {
  return static_cast<std::int64_t>(layer_.spec->num_heads) * layer_.spec->head_dim;
}

std::int64_t ProjectedAttention::key_value_size() const {
  const LayerSpec& spec = *layer_.spec;
  return spec.num_kv_heads * (static_cast<std::int64_t>(spec.head_dim) + spec.value_dim);
}

std::int64_t ProjectedAttention::attended_size() const {
  return static_cast<std::int64_t>(layer_.spec->num_heads) * layer_.spec->value_dim;
}

std::uint64_t ProjectedAttention::ProjectionFlops(std::uint64_t tokens, bool keys,
                                                  std::uint64_t encoder_tokens) const {
  const auto features = static_cast<std::uint64_t>(projected_size(keys) + attended_size());
  return 2 * tokens * static_cast<std::uint64_t>(layer_.hidden_size) * features +
         2 * encoder_tokens * layer_.spec->encoder_hidden_size *
             static_cast<std::uint64_t>(key_value_size());
}

absl::StatusOr<TokenRows> ProjectedAttention::ReadRows(
    const char* field, const TensorView& states, std::int64_t hidden_size,
    const char* lengths_field, const std::vector<std::int64_t>& lengths) const {
  if (!states.defined()) return InvalidField(field, absl::StrCat(field, " is missing"));
  if (!IsFloating(states.dtype)) {
    return InvalidField(field, absl::StrCat(field, " is ", DTypeName(states.dtype),
                                            ", but must be float32, float16 or bfloat16"));
  }
  if (states.rank != 2 && states.rank != 3) {
    return InvalidField(field, absl::StrCat(field, " has shape ", ShapeText(states),
                                            ", but must have rank 3, or 2 with ", lengths_field));
  }
  if (states.extent(states.rank - 1) != hidden_size) {
    return InvalidField(field,
                        absl::StrCat(field, " has hidden size ", states.extent(states.rank - 1),
                                     ", but the layer has ", hidden_size));
  }
  TokenRows rows;
  rows.packed = states.rank == 2;
  rows.lengths = lengths;
  if (rows.packed) {
    rows.batch = static_cast<std::int64_t>(lengths.size());
    rows.count = states.extent(0);
    for (std::int64_t length : lengths) rows.length = std::max(rows.length, length);
  } else {
    rows.batch = states.extent(0);
    rows.length = states.extent(1);
    // Both are bounded by the tensor's bytes, unless one of them is 0.
    rows.count = rows.length == 0 ? 0 : rows.batch * rows.length;
  }
  if (rows.count > max_tokens_) {
    return InvalidField(field, absl::StrCat(field, " has ", rows.count,
                                            " tokens, more than the limit of ", max_tokens_));
  }
  return rows;
}

absl::StatusOr<ProjectedAttention::CallRows> ProjectedAttention::ReadCall(
    const ForwardInputs& inputs) const {
  // Keys of an encoder have places of their own, which nothing in a request tells.
  if (is_cross() && layer_.rotary != nullptr) {
    return MakeError(absl::StatusCode::kUnimplemented, "UNSUPPORTED_MODEL",
                     "cross-attention with rotary embedding is not supported by this server",
                     {{"field", "rotary"}});
  }
  CallRows rows;
  ATTN_ASSIGN_OR_RETURN(rows.tokens,
                        ReadRows("hidden_states", inputs.hidden_states, layer_.hidden_size,
                                 "query_lengths", inputs.query_lengths));
  constexpr char kEncoder[] = "encoder_hidden_states";
  const bool brings = is_cross() && BringsKeys(inputs);
  if (!brings && (inputs.encoder_hidden_states.defined() || !inputs.kv_lengths.empty())) {
    const char* const field = inputs.encoder_hidden_states.defined() ? kEncoder : "kv_lengths";
    return InvalidField(field, absl::StrCat(field, " is set, but ",
                                            is_cross() ? "a read-only call brings no keys"
                                                       : "the layer is self-attention"));
  }
  if (!brings) return rows;
  ATTN_ASSIGN_OR_RETURN(
      rows.encoder, ReadRows(kEncoder, inputs.encoder_hidden_states,
                             layer_.spec->encoder_hidden_size, "kv_lengths", inputs.kv_lengths));
  ATTN_RETURN_IF_ERROR(CheckEncoder(inputs, rows));
  return rows;
}

// Before the attention inside is stated, whose errors speak of queries and keys.
absl::Status ProjectedAttention::CheckEncoder(const ForwardInputs& inputs,
                                              const CallRows& rows) const {
  if (rows.tokens.packed && inputs.query_lengths.empty() && rows.tokens.count > 0) {
    return InvalidField("query_lengths",
                        "query_lengths is missing: hidden_states has rank 2 and needs it");
  }
  if (rows.encoder.batch == rows.tokens.batch) return absl::OkStatus();
  const char* const field = rows.encoder.packed ? "kv_lengths" : "encoder_hidden_states";
  return InvalidField(field,
                      absl::StrCat(field, " is for a batch of ", rows.encoder.batch,
                                   ", but hidden_states has a batch of ", rows.tokens.batch));
}

absl::StatusOr<TokenPositions> ProjectedAttention::ReadPositions(const ForwardInputs& inputs,
                                                                 const TokenRows& tokens) const {
  // Queries of a cross-attention have no place among its keys: only a given position can be wrong.
  if (is_cross() && !inputs.position_ids.defined()) return TokenPositions();
  std::vector<std::int64_t> places(static_cast<std::size_t>(tokens.batch), 0);
  for (std::size_t b = 0; b < places.size(); ++b) {
    if (inputs.past_key.defined()) places[b] = inputs.past_key.extent(2);
    if (inputs.cache == nullptr) continue;
    const CachedRows& rows = inputs.cache->rows();
    const bool reads = rows.mode == CacheMode::kReadOnly;
    places[b] = rows.lengths[b] - (reads ? tokens.length_of(b) : 0);
  }
  return TokenPositions::Create(inputs.position_ids, tokens, places, layer_);
}

absl::StatusOr<AttentionProblem> ProjectedAttention::MakeProblem(const ForwardInputs& inputs,
                                                                 const CallRows& rows,
                                                                 const Projected& projected) const {
  const LayerSpec& spec = *layer_.spec;
  RowParts own(rows.tokens, layer_.dtype, projected_size(OwnKeys(layer_, inputs)),
               projected.tokens);
  AttendInputs attend;
  attend.layout = LayoutOf(rows.tokens);
  attend.query = own.Next(spec.num_heads, spec.head_dim);
  attend.query_lengths = inputs.query_lengths;
  if (BringsKeys(inputs)) {
    RowParts encoder(rows.encoder, layer_.dtype, key_value_size(), projected.encoder);
    RowParts& source = is_cross() ? encoder : own;
    attend.kv_layout = LayoutOf(is_cross() ? rows.encoder : rows.tokens);
    attend.key = source.Next(spec.num_kv_heads, spec.head_dim);
    attend.value = source.Next(spec.num_kv_heads, spec.value_dim);
    attend.kv_lengths = is_cross() ? inputs.kv_lengths : inputs.query_lengths;
  }
  if (inputs.cache != nullptr) attend.cache = &inputs.cache->rows();
  attend.attention_mask = inputs.attention_mask;
  attend.options = inputs.options;
  attend.past_key = inputs.past_key;
  attend.past_value = inputs.past_value;
  attend.stage =
      inputs.output_attentions ? kernels::ScoreStage::kProbabilities : kernels::ScoreStage::kNone;
  attend.output_present = inputs.use_cache;
  attend.present_layout = TensorLayout::kHeadsFirst;
  return AttentionProblem::Create(attend, &spec, max_tokens_);
}

absl::StatusOr<ForwardPlan> ProjectedAttention::Plan(const ForwardInputs& inputs) const {
  ATTN_ASSIGN_OR_RETURN(const CallRows rows, ReadCall(inputs));
  ATTN_ASSIGN_OR_RETURN(const AttentionProblem problem, MakeProblem(inputs, rows, Projected()));
  ATTN_RETURN_IF_ERROR(ReadPositions(inputs, rows.tokens).status());
  ForwardPlan plan;
  plan.shape = problem.shape();
  plan.outputs = problem.outputs();
  const TensorView& hidden = inputs.hidden_states;
  plan.outputs.output = {
      hidden.dtype,
      std::vector<std::int64_t>(hidden.extents.begin(), hidden.extents.begin() + hidden.rank)};
  return plan;
}

absl::Status ProjectedAttention::ProjectTokens(const ForwardInputs& inputs, const TokenRows& tokens,
                                               void* projected, ExecutionContext& context) const {
  const LayerSpec& spec = *layer_.spec;
  const LayerWeights& weights = *layer_.weights;
  const bool keys = OwnKeys(layer_, inputs);
  const std::int64_t size = projected_size(keys);
  ATTN_RETURN_IF_ERROR(RunTorch(context.workspace.meter(), [&] {
    const at::Tensor hidden =
        AsTensor(inputs.hidden_states).reshape({tokens.count, layer_.hidden_size});
    const at::Tensor rows = AsTensor(TensorView(projected, layer_.dtype, {tokens.count, size}));
    Project(rows, hidden.to(ToScalarType(layer_.dtype)), weights.query_key_value);
    NormalizeHeads(rows.narrow(1, 0, query_size()).unflatten(1, {spec.num_heads, spec.head_dim}),
                   weights.query_norm, weights.norm_epsilon);
    if (!keys) return;
    const std::int64_t key_size = static_cast<std::int64_t>(spec.num_kv_heads) * spec.head_dim;
    NormalizeHeads(
        rows.narrow(1, query_size(), key_size).unflatten(1, {spec.num_kv_heads, spec.head_dim}),
        weights.key_norm, weights.norm_epsilon);
  }));
  if (layer_.rotary == nullptr) return absl::OkStatus();
  ATTN_ASSIGN_OR_RETURN(const TokenPositions positions, ReadPositions(inputs, tokens));
  const std::int64_t heads = spec.num_heads + (keys ? spec.num_kv_heads : 0);
  return EncodePositions(*layer_.rotary, positions,
                         {projected, layer_.dtype, size, heads, spec.head_dim}, context);
}

absl::Status ProjectedAttention::ProjectEncoder(const ForwardInputs& inputs,
                                                const TokenRows& encoder, void* projected,
                                                ExecutionContext& context) const {
  const LayerSpec& spec = *layer_.spec;
  const LayerWeights& weights = *layer_.weights;
  return RunTorch(context.workspace.meter(), [&] {
    const at::Tensor hidden =
        AsTensor(inputs.encoder_hidden_states).reshape({encoder.count, spec.encoder_hidden_size});
    const at::Tensor rows =
        AsTensor(TensorView(projected, layer_.dtype, {encoder.count, key_value_size()}));
    Project(rows, hidden.to(ToScalarType(layer_.dtype)), weights.key_value);
    const std::int64_t key_size = static_cast<std::int64_t>(spec.num_kv_heads) * spec.head_dim;
    NormalizeHeads(rows.narrow(1, 0, key_size).unflatten(1, {spec.num_kv_heads, spec.head_dim}),
                   weights.key_norm, weights.norm_epsilon);
  });
}

absl::Status ProjectedAttention::ProjectOutput(const ForwardInputs& inputs, const TokenRows& tokens,
                                               void* attended, MutableTensorView view,
                                               ExecutionContext& context) const {
  return RunTorch(context.workspace.meter(), [&] {
    const at::Tensor rows =
        AsTensor(TensorView(attended, layer_.dtype, {tokens.count, attended_size()}));
    at::Tensor output = AsTensor(view).reshape({tokens.count, layer_.hidden_size});
    if (view.dtype == layer_.dtype) {
      Project(output, rows, layer_.weights->output);
    } else {
      at::Tensor result = rows.new_empty({tokens.count, layer_.hidden_size});
      Project(result, rows, layer_.weights->output);
      output.copy_(result);
    }
    if (tokens.packed) return;
    for (std::size_t b = 0; b < inputs.query_lengths.size();
         ++b) {  // padding is zero, not the bias
      const std::int64_t length = inputs.query_lengths[b];
      const std::int64_t start = static_cast<std::int64_t>(b) * tokens.length + length;
      output.narrow(0, start, tokens.length - length).zero_();
    }
  });
}

absl::Status ProjectedAttention::Forward(const ForwardInputs& inputs, const ForwardOutputs& outputs,
                                         ExecutionContext& context) const {
  ATTN_ASSIGN_OR_RETURN(const CallRows rows, ReadCall(inputs));
  const TokenRows& tokens = rows.tokens;
  const bool keys = OwnKeys(layer_, inputs);
  const bool encodes = is_cross() && BringsKeys(inputs);
  const auto take = [&](std::int64_t count, std::int64_t features) {
    return context.workspace.Take(static_cast<std::size_t>(count * features) *
                                  ItemSize(layer_.dtype));
  };
  Projected projected;
  ATTN_ASSIGN_OR_RETURN(projected.tokens, take(tokens.count, projected_size(keys)));
  if (encodes) {
    ATTN_ASSIGN_OR_RETURN(projected.encoder, take(rows.encoder.count, key_value_size()));
  }
  ATTN_ASSIGN_OR_RETURN(void* const attended, take(tokens.count, attended_size()));
  ATTN_ASSIGN_OR_RETURN(AttentionProblem problem, MakeProblem(inputs, rows, projected));
  if (inputs.cache != nullptr) ATTN_RETURN_IF_ERROR(ReserveCache(problem, *inputs.cache));
  ATTN_RETURN_IF_ERROR(ProjectTokens(inputs, tokens, projected.tokens, context));
  if (encodes) {
    ATTN_RETURN_IF_ERROR(ProjectEncoder(inputs, rows.encoder, projected.encoder, context));
  }
  if (inputs.cache != nullptr) {
    AppendToCache(problem, *inputs.cache, context.device.executor());
  }

  AttendOutputs attend;
  const std::vector<std::int64_t>& shape = problem.outputs().output.shape;
  attend.output =
      MutableTensorView(attended, layer_.dtype, shape.data(), static_cast<int>(shape.size()));
  attend.attention_weights = outputs.attention_weights;
  attend.present_key = outputs.present_key;
  attend.present_value = outputs.present_value;
  problem.Bind(attend);
  ATTN_RETURN_IF_ERROR(implementation_->Attend(problem.args(), problem.shape(), context));
  ATTN_RETURN_IF_ERROR(ProjectOutput(inputs, tokens, attended, outputs.output, context));
  context.flops += ProjectionFlops(static_cast<std::uint64_t>(tokens.count), keys,
                                   static_cast<std::uint64_t>(rows.encoder.count));
  return absl::OkStatus();
}

attn::MemoryUsage ProjectedAttention::MemoryUsage(const AttentionShape& shape, int workers) const {
  attn::MemoryUsage usage = implementation_->WorkspaceBytes(shape, workers);
  std::int64_t features = shape.q_len * (projected_size(!is_cross()) + attended_size());
  if (is_cross()) features += shape.kv_len * key_value_size();
  usage.bytes += static_cast<std::uint64_t>(shape.batch * features) * ItemSize(layer_.dtype);
  if (layer_.rotary != nullptr) usage.bytes += PositionWorkspaceBytes(*layer_.rotary, workers);
  return usage;
}

attn::ComputeComplexity ProjectedAttention::ComputeComplexity(const AttentionShape& shape) const {
  attn::ComputeComplexity work = implementation_->Complexity(shape);
  work.flops +=
      ProjectionFlops(static_cast<std::uint64_t>(shape.batch * shape.q_len), !is_cross(),
                      is_cross() ? static_cast<std::uint64_t>(shape.batch * shape.kv_len) : 0);
  work.growth = "O(n^2 d + n d hidden_size)";
  return work;
}

}  // namespace attn
