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

std::int64_t ProjectedAttention::projected_size(bool keys) const {
  const LayerSpec& spec = *layer_.spec;
  const auto dims = static_cast<std::int64_t>(spec.head_dim) + spec.value_dim;
  return query_size() + (keys ? spec.num_kv_heads * dims : 0);
}

std::int64_t ProjectedAttention::attended_size() const {
  return static_cast<std::int64_t>(layer_.spec->num_heads) * layer_.spec->value_dim;
}

std::uint64_t ProjectedAttention::ProjectionFlops(std::uint64_t tokens, bool keys) const {
  const auto features = static_cast<std::uint64_t>(projected_size(keys) + attended_size());
  return 2 * tokens * static_cast<std::uint64_t>(layer_.hidden_size) * features;
}

absl::StatusOr<TokenRows> ProjectedAttention::ReadTokens(const ForwardInputs& inputs) const {
  const TensorView& hidden = inputs.hidden_states;
  if (!hidden.defined()) return InvalidField("hidden_states", "hidden_states is missing");
  if (!IsFloating(hidden.dtype)) {
    return InvalidField("hidden_states",
                        absl::StrCat("hidden_states is ", DTypeName(hidden.dtype),
                                     ", but must be float32, float16 or bfloat16"));
  }
  if (hidden.rank != 2 && hidden.rank != 3) {
    return InvalidField("hidden_states",
                        absl::StrCat("hidden_states has shape ", ShapeText(hidden),
                                     ", but must have rank 3, or 2 with query_lengths"));
  }
  if (hidden.extent(hidden.rank - 1) != layer_.hidden_size) {
    return InvalidField("hidden_states", absl::StrCat("hidden_states has hidden size ",
                                                      hidden.extent(hidden.rank - 1),
                                                      ", but the layer has ", layer_.hidden_size));
  }
  TokenRows tokens;
  tokens.packed = hidden.rank == 2;
  tokens.lengths = inputs.query_lengths;
  if (tokens.packed) {
    tokens.batch = static_cast<std::int64_t>(inputs.query_lengths.size());
    tokens.count = hidden.extent(0);
    for (std::int64_t length : inputs.query_lengths)
      tokens.length = std::max(tokens.length, length);
  } else {
    tokens.batch = hidden.extent(0);
    tokens.length = hidden.extent(1);
    // Both are bounded by the tensor's bytes, unless one of them is 0.
    tokens.count = tokens.length == 0 ? 0 : tokens.batch * tokens.length;
  }
  if (tokens.count > max_tokens_) {
    return InvalidField("hidden_states",
                        absl::StrCat("hidden_states has ", tokens.count,
                                     " tokens, more than the limit of ", max_tokens_));
  }
  return tokens;
}

absl::StatusOr<TokenPositions> ProjectedAttention::ReadPositions(const ForwardInputs& inputs,
                                                                 const TokenRows& tokens) const {
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
                                                                 const TokenRows& tokens,
                                                                 const void* projected) const {
  const LayerSpec& spec = *layer_.spec;
  const bool keys = BringsKeys(inputs);
  const std::int64_t row = projected_size(keys);
  std::int64_t offset = 0;  // of the part within a row
  const auto part = [&](std::int64_t heads, std::int64_t dim) {
    TensorView view;
    view.dtype = layer_.dtype;
    if (projected != nullptr) {
      view.data = static_cast<const char*>(projected) +
                  offset * static_cast<std::int64_t>(ItemSize(view.dtype));
    }
    if (tokens.packed) {
      view.rank = 3;
      view.extents = {tokens.count, heads, dim};
      view.strides = {row, dim, 1};
    } else {
      view.rank = 4;
      view.extents = {tokens.batch, tokens.length, heads, dim};
      view.strides = {tokens.length * row, row, dim, 1};
    }
    offset += heads * dim;
    return view;
  };
  AttendInputs attend;
  attend.layout = tokens.packed ? TensorLayout::kPacked : TensorLayout::kTokensFirst;
  attend.query = part(spec.num_heads, spec.head_dim);
  attend.query_lengths = inputs.query_lengths;
  if (keys) {
    attend.key = part(spec.num_kv_heads, spec.head_dim);
    attend.value = part(spec.num_kv_heads, spec.value_dim);
    attend.kv_lengths = inputs.query_lengths;
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
  ATTN_ASSIGN_OR_RETURN(const TokenRows tokens, ReadTokens(inputs));
  ATTN_ASSIGN_OR_RETURN(const AttentionProblem problem, MakeProblem(inputs, tokens, nullptr));
  ATTN_RETURN_IF_ERROR(ReadPositions(inputs, tokens).status());
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
  const bool keys = BringsKeys(inputs);
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
  ATTN_ASSIGN_OR_RETURN(const TokenRows tokens, ReadTokens(inputs));
  const auto take = [&](std::int64_t features) {
    return context.workspace.Take(static_cast<std::size_t>(tokens.count * features) *
                                  ItemSize(layer_.dtype));
  };
  const bool keys = BringsKeys(inputs);
  ATTN_ASSIGN_OR_RETURN(void* const projected, take(projected_size(keys)));
  ATTN_ASSIGN_OR_RETURN(void* const attended, take(attended_size()));
  ATTN_ASSIGN_OR_RETURN(AttentionProblem problem, MakeProblem(inputs, tokens, projected));
  if (inputs.cache != nullptr) ATTN_RETURN_IF_ERROR(ReserveCache(problem, *inputs.cache));
  ATTN_RETURN_IF_ERROR(ProjectTokens(inputs, tokens, projected, context));
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
  context.flops += ProjectionFlops(static_cast<std::uint64_t>(tokens.count), keys);
  return absl::OkStatus();
}

attn::MemoryUsage ProjectedAttention::MemoryUsage(const AttentionShape& shape, int workers) const {
  attn::MemoryUsage usage = implementation_->WorkspaceBytes(shape, workers);
  const std::int64_t features = projected_size() + attended_size();
  usage.bytes +=
      static_cast<std::uint64_t>(shape.batch * shape.q_len * features) * ItemSize(layer_.dtype);
  if (layer_.rotary != nullptr) usage.bytes += PositionWorkspaceBytes(*layer_.rotary, workers);
  return usage;
}

attn::ComputeComplexity ProjectedAttention::ComputeComplexity(const AttentionShape& shape) const {
  attn::ComputeComplexity work = implementation_->Complexity(shape);
  work.flops += ProjectionFlops(static_cast<std::uint64_t>(shape.batch * shape.q_len));
  work.growth = "O(n^2 d + n d hidden_size)";
  return work;
}

}  // namespace attn
