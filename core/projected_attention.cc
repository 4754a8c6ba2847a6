#include "core/projected_attention.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/torch_support.h"

namespace attn {
namespace {

at::Tensor AsTensor(const Parameter& parameter) {
  return AsTensor(TensorView(parameter.data.get(), parameter.dtype, parameter.shape.data(),
                             static_cast<int>(parameter.shape.size())));
}

// out = x W^T + b, written where `out` lies.
void Project(at::Tensor out, const at::Tensor& x, const Projection& projection) {
  const at::Tensor weight = AsTensor(projection.weight).t();
  if (projection.bias.defined()) {
    at::addmm_out(out, AsTensor(projection.bias), x, weight);
  } else {
    at::mm_out(out, x, weight);
  }
}

// RMS norm over the last dimension, in float32, in place: x / sqrt(mean(x^2) + epsilon) * weight.
void NormalizeHeads(at::Tensor heads, const Parameter& weight, float epsilon) {
  if (!weight.defined()) return;
  const at::Tensor x = heads.to(c10::ScalarType::Float);
  const at::Tensor scale = x.pow(2).mean(-1, true).add_(epsilon).rsqrt_();
  heads.copy_(x.mul(scale).to(heads.scalar_type()).mul(AsTensor(weight)));
}

}  // namespace

struct ProjectedAttention::Tokens {
  bool packed = false;
  std::int64_t batch = 0;   // packed: of query_lengths
  std::int64_t length = 0;  // of the padded rows; packed: the longest row
  std::int64_t count = 0;   // rows of the GEMMs, padding included
};

std::int64_t ProjectedAttention::projected_size() const {
  const LayerSpec& spec = *layer_.spec;
  const auto heads = static_cast<std::int64_t>(spec.num_heads) + spec.num_kv_heads;
  return heads * spec.head_dim + static_cast<std::int64_t>(spec.num_kv_heads) * spec.value_dim;
}

std::int64_t ProjectedAttention::attended_size() const {
  return static_cast<std::int64_t>(layer_.spec->num_heads) * layer_.spec->value_dim;
}

std::uint64_t ProjectedAttention::ProjectionFlops(std::uint64_t tokens) const {
  const auto features = static_cast<std::uint64_t>(projected_size() + attended_size());
  return 2 * tokens * static_cast<std::uint64_t>(layer_.hidden_size) * features;
}

absl::StatusOr<ProjectedAttention::Tokens> ProjectedAttention::ReadTokens(
    const ForwardInputs& inputs) const {
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
  Tokens tokens;
  tokens.packed = hidden.rank == 2;
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

absl::Status ProjectedAttention::CheckPositions(const ForwardInputs& inputs,
                                                const Tokens& tokens) const {
  const std::int64_t past = inputs.past_key.defined() ? inputs.past_key.extent(2) : 0;
  const auto beyond = [&](std::int64_t position) {
    return MakeError(absl::StatusCode::kOutOfRange, "POSITION_OUT_OF_RANGE",
                     absl::StrCat("position ", position, " is beyond the model's last one, ",
                                  layer_.max_positions - 1),
                     {{"max_positions", absl::StrCat(layer_.max_positions)}});
  };
  const TensorView& ids = inputs.position_ids;
  const auto& lengths = inputs.query_lengths;  // beyond them is padding, which has no position
  const std::int64_t longest =
      lengths.empty() ? tokens.length : *std::max_element(lengths.begin(), lengths.end());
  if (!ids.defined()) {
    const std::int64_t last = past + longest - 1;
    return layer_.max_positions > 0 && last >= layer_.max_positions ? beyond(last)
                                                                    : absl::OkStatus();
  }
  if (ids.dtype != DType::kInt64) {
    return InvalidField("position_ids", absl::StrCat("position_ids is ", DTypeName(ids.dtype),
                                                     ", but must be int64"));
  }
  const int own_rank = tokens.packed ? 1 : 2;
  bool fits = ids.rank == own_rank || ids.rank == own_rank + 1;
  if (fits && tokens.packed) fits = ids.extent(ids.rank - 1) == tokens.count;
  if (fits && !tokens.packed) {
    const std::int64_t rows = ids.extent(ids.rank - 2);
    fits = (rows == 1 || rows == tokens.batch) && ids.extent(ids.rank - 1) == tokens.length;
  }
  if (fits && ids.rank > own_rank) fits = ids.extent(0) >= 1 && ids.extent(0) <= 3;
  if (!fits) {
    return InvalidField("position_ids",
                        absl::StrCat("position_ids has shape ", ShapeText(ids),
                                     ", which does not fit the tokens of hidden_states"));
  }
  const std::int64_t rows = tokens.packed ? 1 : ids.extent(ids.rank - 2);
  for (std::int64_t i = 0; i < ids.num_elements(); ++i) {
    if (!tokens.packed && !lengths.empty()) {
      const auto row = static_cast<std::size_t>(i / tokens.length % rows);
      if (i % tokens.length >= (rows == 1 ? longest : lengths[row])) continue;
    }
    std::int64_t position = 0;
    std::memcpy(&position, static_cast<const char*>(ids.data) + i * 8, sizeof(position));
    if (position < 0) {
      return InvalidField("position_ids", absl::StrCat("position_ids has an entry of ", position));
    }
    if (layer_.max_positions > 0 && position >= layer_.max_positions) return beyond(position);
  }
  return absl::OkStatus();
}

absl::Status ProjectedAttention::CheckCachePosition(const ForwardInputs& inputs,
                                                    const Tokens& tokens) const {
  if (inputs.cache_position.empty()) return absl::OkStatus();
  if (static_cast<std::int64_t>(inputs.cache_position.size()) != tokens.batch) {
    return InvalidField("cache_position",
                        absl::StrCat("cache_position has ", inputs.cache_position.size(),
                                     " entries for a batch of ", tokens.batch));
  }
  const std::int64_t past = inputs.past_key.defined() ? inputs.past_key.extent(2) : 0;
  for (std::int64_t position : inputs.cache_position) {
    if (position == past || position == -1) continue;
    const bool beyond = position > past;
    return MakeError(
        beyond ? absl::StatusCode::kOutOfRange : absl::StatusCode::kAborted,
        beyond ? "CACHE_POSITION_BEYOND" : "CACHE_POSITION_BELOW",
        absl::StrCat("cache_position is ", position, ", but the past's length is ", past),
        {{"length", absl::StrCat(past)}});
  }
  return absl::OkStatus();
}

absl::StatusOr<AttentionProblem> ProjectedAttention::MakeProblem(const ForwardInputs& inputs,
                                                                 const Tokens& tokens,
                                                                 const void* projected) const {
  const LayerSpec& spec = *layer_.spec;
  const std::int64_t row = projected_size();
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
  attend.key = part(spec.num_kv_heads, spec.head_dim);
  attend.value = part(spec.num_kv_heads, spec.value_dim);
  attend.query_lengths = inputs.query_lengths;
  attend.kv_lengths = inputs.query_lengths;
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
  ATTN_ASSIGN_OR_RETURN(const Tokens tokens, ReadTokens(inputs));
  ATTN_ASSIGN_OR_RETURN(const AttentionProblem problem, MakeProblem(inputs, tokens, nullptr));
  ATTN_RETURN_IF_ERROR(CheckPositions(inputs, tokens));
  ATTN_RETURN_IF_ERROR(CheckCachePosition(inputs, tokens));
  ForwardPlan plan;
  plan.shape = problem.shape();
  plan.outputs = problem.outputs();
  const TensorView& hidden = inputs.hidden_states;
  plan.outputs.output = {
      hidden.dtype,
      std::vector<std::int64_t>(hidden.extents.begin(), hidden.extents.begin() + hidden.rank)};
  return plan;
}

absl::Status ProjectedAttention::Forward(const ForwardInputs& inputs, const ForwardOutputs& outputs,
                                         ExecutionContext& context) const {
  const LayerSpec& spec = *layer_.spec;
  const LayerWeights& weights = *layer_.weights;
  ATTN_ASSIGN_OR_RETURN(const Tokens tokens, ReadTokens(inputs));
  const auto take = [&](std::int64_t features) {
    return context.workspace.Take(static_cast<std::size_t>(tokens.count * features) *
                                  ItemSize(layer_.dtype));
  };
  ATTN_ASSIGN_OR_RETURN(void* const projected, take(projected_size()));
  ATTN_ASSIGN_OR_RETURN(void* const attended, take(attended_size()));
  ATTN_ASSIGN_OR_RETURN(AttentionProblem problem, MakeProblem(inputs, tokens, projected));

  MemoryMeter& meter = context.workspace.meter();
  ATTN_RETURN_IF_ERROR(RunTorch(meter, [&] {
    const at::Tensor hidden =
        AsTensor(inputs.hidden_states).reshape({tokens.count, layer_.hidden_size});
    const at::Tensor rows =
        AsTensor(TensorView(projected, layer_.dtype, {tokens.count, projected_size()}));
    Project(rows, hidden.to(ToScalarType(layer_.dtype)), weights.query_key_value);
    const std::int64_t query_size = static_cast<std::int64_t>(spec.num_heads) * spec.head_dim;
    const std::int64_t key_size = static_cast<std::int64_t>(spec.num_kv_heads) * spec.head_dim;
    NormalizeHeads(rows.narrow(1, 0, query_size).unflatten(1, {spec.num_heads, spec.head_dim}),
                   weights.query_norm, weights.norm_epsilon);
    NormalizeHeads(
        rows.narrow(1, query_size, key_size).unflatten(1, {spec.num_kv_heads, spec.head_dim}),
        weights.key_norm, weights.norm_epsilon);
  }));

  AttendOutputs attend;
  const std::vector<std::int64_t>& shape = problem.outputs().output.shape;
  attend.output =
      MutableTensorView(attended, layer_.dtype, shape.data(), static_cast<int>(shape.size()));
  attend.attention_weights = outputs.attention_weights;
  attend.present_key = outputs.present_key;
  attend.present_value = outputs.present_value;
  problem.Bind(attend);
  ATTN_RETURN_IF_ERROR(implementation_->Attend(problem.args(), problem.shape(), context));

  ATTN_RETURN_IF_ERROR(RunTorch(meter, [&] {
    const at::Tensor rows =
        AsTensor(TensorView(attended, layer_.dtype, {tokens.count, attended_size()}));
    at::Tensor output = AsTensor(outputs.output).reshape({tokens.count, layer_.hidden_size});
    if (outputs.output.dtype == layer_.dtype) {
      Project(output, rows, weights.output);
    } else {
      at::Tensor result = rows.new_empty({tokens.count, layer_.hidden_size});
      Project(result, rows, weights.output);
      output.copy_(result);
    }
    if (!tokens.packed) {  // padding is zero, not the bias
      for (std::size_t b = 0; b < inputs.query_lengths.size(); ++b) {
        const std::int64_t length = inputs.query_lengths[b];
        const std::int64_t start = static_cast<std::int64_t>(b) * tokens.length + length;
        output.narrow(0, start, tokens.length - length).zero_();
      }
    }
  }));
  context.flops += ProjectionFlops(static_cast<std::uint64_t>(tokens.count));
  return absl::OkStatus();
}

attn::MemoryUsage ProjectedAttention::MemoryUsage(const AttentionShape& shape, int workers) const {
  attn::MemoryUsage usage = implementation_->WorkspaceBytes(shape, workers);
  const std::int64_t features = projected_size() + attended_size();
  usage.bytes +=
      static_cast<std::uint64_t>(shape.batch * shape.q_len * features) * ItemSize(layer_.dtype);
  return usage;
}

attn::ComputeComplexity ProjectedAttention::ComputeComplexity(const AttentionShape& shape) const {
  attn::ComputeComplexity work = AttentionComplexity(shape);
  work.flops += ProjectionFlops(static_cast<std::uint64_t>(shape.batch * shape.q_len));
  work.growth = "O(n^2 d + n d hidden_size)";
  return work;
}

}  // namespace attn
