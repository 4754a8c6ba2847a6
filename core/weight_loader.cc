#include "core/weight_loader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "core/dtype_conversion.h"
#include "core/error.h"
#include "core/host_memory.h"

namespace attn {
namespace {

constexpr std::size_t kSliceBytes = std::size_t{1} << 20;

// One of the combinations of prefix and naming that a family allows.
struct Naming {
  const char* prefix;
  const ProjectionNames* names;
};

std::string TensorName(const Naming& naming, const char* pattern, std::uint32_t layer,
                       const char* suffix) {
  return absl::StrCat(naming.prefix, absl::StrReplaceAll(pattern, {{"{}", absl::StrCat(layer)}}),
                      suffix);
}

absl::Status BadTensor(const std::string& name, const std::string& problem) {
  return MakeError(absl::StatusCode::kInvalidArgument, "BAD_MODEL_DIRECTORY",
                   absl::StrCat("tensor ", name, " ", problem), {{"tensor", name}});
}

std::vector<float> Floats(const SafetensorsEntry& entry, std::size_t count) {
  std::vector<float> values(count);
  ConvertElements(entry.data, entry.dtype, values.data(), DType::kFloat32, count);
  return values;
}

int WeightsOfFirstLayer(const ModelTensors& tensors, const Naming& naming) {
  int present = 0;
  const ProjectionNames& names = *naming.names;
  for (const char* pattern :
       {names.query, names.key, names.value, names.output, names.query_key_value}) {
    if (pattern == nullptr) continue;
    present += tensors.Find(TensorName(naming, pattern, 0, ".weight")) != nullptr ? 1 : 0;
  }
  return present;
}

const char* FirstName(const ProjectionNames& names) {
  return names.query != nullptr ? names.query : names.query_key_value;
}

// The combination that most of the first layer goes by, so that a missing tensor is named as its
// neighbours are.
absl::StatusOr<Naming> ChooseNaming(const ModelTensors& tensors, const StackTensors& names) {
  Naming best{names.prefixes.front(), &names.namings.front()};
  int most = WeightsOfFirstLayer(tensors, best);
  for (const char* prefix : names.prefixes) {
    for (const ProjectionNames& projections : names.namings) {
      const Naming naming{prefix, &projections};
      if (prefix == best.prefix && &projections == best.names) continue;
      const int present = WeightsOfFirstLayer(tensors, naming);
      // A dual encoder, say: which of the two is meant can't be known. (An output projection alone
      // may be shared by two namings.)
      if (std::min(present, most) > 1) {
        return BadTensor(
            TensorName(naming, FirstName(projections), 0, ".weight"),
            absl::StrCat("and ", TensorName(best, FirstName(*best.names), 0, ".weight"),
                         " name the same layer twice"));
      }
      if (present > most) {
        best = naming;
        most = present;
      }
    }
  }
  return best;
}

// Plans one layer: `rows` of query, key and value in this order, `columns` of the hidden state.
class LayerPlanner {
 public:
  LayerPlanner(const ModelTensors& tensors, const Naming& naming, const StackTensors& names,
               AttentionKind kind, std::uint32_t layer)
      : tensors_(tensors), naming_(naming), names_(names), kind_(kind), layer_(layer) {}

  absl::StatusOr<PlannedLayer> Plan(const LayerSpec& spec, std::int64_t hidden_size) const {
    PlannedLayer plan;
    ATTN_RETURN_IF_ERROR(PlanInputs(spec, hidden_size, plan));
    const char* output = naming_.names->output;
    const std::int64_t output_columns = std::int64_t{spec.num_heads} * spec.value_dim;
    ATTN_RETURN_IF_ERROR(
        Append(output, ".weight", {hidden_size, output_columns}, plan.output_weight));
    ATTN_RETURN_IF_ERROR(AppendBias(output, names_.output_bias, hidden_size, plan.output_bias));
    if (!names_.output_bias) plan.output_bias = {};
    if (names_.query_norm != nullptr) {
      ATTN_RETURN_IF_ERROR(Append(names_.query_norm, "", {spec.head_dim}, plan.query_norm));
    }
    if (names_.key_norm != nullptr) {
      ATTN_RETURN_IF_ERROR(Append(names_.key_norm, "", {spec.head_dim}, plan.key_norm));
    }
    if (names_.sinks != nullptr) {
      ATTN_RETURN_IF_ERROR(PlanSinks(spec, plan));
    }
    plan.norm_epsilon = names_.norm_epsilon;
    plan.norm_offset = names_.norm_offset;
    return plan;
  }

 private:
  absl::Status PlanInputs(const LayerSpec& spec, std::int64_t hidden_size,
                          PlannedLayer& plan) const {
    struct Part {
      const char* pattern;
      std::int64_t rows;
      bool biased;
      bool of_encoder;
    };
    const bool cross = kind_ == AttentionKind::kCross;
    const ProjectionNames& names = *naming_.names;
    const std::int64_t query_rows = std::int64_t{spec.num_heads} * spec.head_dim;
    const std::int64_t key_rows = std::int64_t{spec.num_kv_heads} * spec.head_dim;
    const std::int64_t value_rows = std::int64_t{spec.num_kv_heads} * spec.value_dim;
    const bool any_bias = names_.query_bias || names_.key_bias || names_.value_bias;
    std::vector<Part> parts = {{names.query, query_rows, names_.query_bias, false},
                               {names.key, key_rows, names_.key_bias, cross},
                               {names.value, value_rows, names_.value_bias, cross}};
    if (names.query_key_value != nullptr) {
      parts = {{names.query_key_value, query_rows + key_rows + value_rows, any_bias, false}};
    }
    for (const Part& part : parts) {
      const std::int64_t columns = part.of_encoder ? spec.encoder_hidden_size : hidden_size;
      ATTN_RETURN_IF_ERROR(
          Append(part.pattern, ".weight", {part.rows, columns},
                 part.of_encoder ? plan.key_value_weight : plan.query_key_value_weight));
      ATTN_RETURN_IF_ERROR(
          AppendBias(part.pattern, part.biased, part.rows,
                     part.of_encoder ? plan.key_value_bias : plan.query_key_value_bias));
    }
    for (PlannedParameter* bias : {&plan.query_key_value_bias, &plan.key_value_bias}) {
      if (AllZeros(*bias)) *bias = {};
    }
    return absl::OkStatus();
  }

  static bool AllZeros(const PlannedParameter& parameter) {
    return std::all_of(parameter.parts.begin(), parameter.parts.end(),
                       [](const PlannedParameter::Part& part) { return part.entry == nullptr; });
  }

  // They become options of the layer's spec, which every request would be refused for.
  absl::Status PlanSinks(const LayerSpec& spec, PlannedLayer& plan) const {
    ATTN_RETURN_IF_ERROR(Append(names_.sinks, "", {spec.num_heads}, plan.sinks));
    for (float sink : Floats(*plan.sinks.parts.front().entry, spec.num_heads)) {
      if (std::isnan(sink) || sink == std::numeric_limits<float>::infinity()) {
        return BadTensor(TensorName(naming_, names_.sinks, layer_, ""),
                         absl::StrCat("has an element of ", sink));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Append(const char* pattern, const char* suffix,
                      const std::vector<std::int64_t>& shape, PlannedParameter& parameter) const {
    const std::string name = TensorName(naming_, pattern, layer_, suffix);
    const SafetensorsEntry* entry = tensors_.Find(name);
    if (entry == nullptr) return BadTensor(name, "is missing");
    if (entry->shape != shape) {
      return BadTensor(
          name, absl::StrCat("has shape [", absl::StrJoin(entry->shape, ", "),
                             "], but config.json calls for [", absl::StrJoin(shape, ", "), "]"));
    }
    if (!IsFloating(entry->dtype)) {
      return MakeError(absl::StatusCode::kUnimplemented, "UNSUPPORTED_MODEL",
                       absl::StrCat("tensor ", name, " has dtype ", entry->dtype_name,
                                    ", which is not one of F32, F16, BF16"),
                       {{"tensor", name}, {"value", entry->dtype_name}});
    }
    AddPart(entry, shape, parameter);
    return absl::OkStatus();
  }

  absl::Status AppendBias(const char* pattern, bool expected, std::int64_t rows,
                          PlannedParameter& parameter) const {
    if (expected) return Append(pattern, ".bias", {rows}, parameter);
    const std::string name = TensorName(naming_, pattern, layer_, ".bias");
    if (tensors_.Find(name) != nullptr) {
      return BadTensor(name, "is there, but config.json rules it out");
    }
    AddPart(nullptr, {rows}, parameter);
    return absl::OkStatus();
  }

  static void AddPart(const SafetensorsEntry* entry, const std::vector<std::int64_t>& shape,
                      PlannedParameter& parameter) {
    std::int64_t elements = 1;
    for (std::int64_t extent : shape) elements *= extent;
    parameter.parts.push_back({entry, elements});
    if (parameter.shape.empty()) {
      parameter.shape = shape;
    } else {
      parameter.shape[0] += shape[0];
    }
  }

  const ModelTensors& tensors_;
  const Naming& naming_;
  const StackTensors& names_;
  AttentionKind kind_;
  std::uint32_t layer_;
};

absl::StatusOr<Parameter> LoadParameter(const PlannedParameter& plan, DType dtype,
                                        const SliceRunner& run_slice) {
  Parameter parameter;
  if (plan.parts.empty()) return parameter;
  parameter.dtype = dtype;
  parameter.shape = plan.shape;
  const std::size_t item = ItemSize(dtype);
  ATTN_ASSIGN_OR_RETURN(
      const Buffer memory,
      AllocateHostMemory(static_cast<std::size_t>(parameter.num_elements()) * item));
  auto* target = static_cast<unsigned char*>(memory.data.get());
  for (const PlannedParameter::Part& part : plan.parts) {
    const DType from = part.entry == nullptr ? dtype : part.entry->dtype;
    const std::size_t slice = kSliceBytes / std::max(ItemSize(from), item);
    const auto elements = static_cast<std::size_t>(part.elements);
    for (std::size_t begin = 0; begin < elements; begin += slice) {
      const std::size_t count = std::min(slice, elements - begin);
      ATTN_RETURN_IF_ERROR(run_slice([&] {
        unsigned char* to = target + begin * item;
        if (part.entry == nullptr) {
          std::memset(to, 0, count * item);
        } else {
          ConvertElements(part.entry->data + begin * ItemSize(from), from, to, dtype, count);
        }
      }));
    }
    target += elements * item;
  }
  parameter.data = memory.data;
  return parameter;
}

// With an offset in float32, which keeps small weights beside it.
absl::StatusOr<Parameter> LoadNorm(const PlannedParameter& plan, float offset, DType dtype,
                                   const SliceRunner& run_slice) {
  if (plan.parts.empty() || offset == 0.0f) return LoadParameter(plan, dtype, run_slice);
  const auto count = static_cast<std::size_t>(plan.parts.front().elements);
  std::vector<float> values = Floats(*plan.parts.front().entry, count);
  for (float& value : values) value += offset;
  Parameter parameter;
  parameter.dtype = DType::kFloat32;
  parameter.shape = plan.shape;
  ATTN_ASSIGN_OR_RETURN(const Buffer memory, AllocateHostMemory(count * sizeof(float)));
  std::memcpy(memory.data.get(), values.data(), count * sizeof(float));
  parameter.data = memory.data;
  return parameter;
}

absl::StatusOr<std::vector<PlannedLayer>> PlanLayers(const ModelTensors& tensors,
                                                     const std::vector<LayerSpec>& runs,
                                                     std::int64_t hidden_size, AttentionKind kind,
                                                     const StackTensors& names) {
  ATTN_ASSIGN_OR_RETURN(const Naming naming, ChooseNaming(tensors, names));
  std::vector<PlannedLayer> layers;
  for (const LayerSpec& run : runs) {
    for (std::uint32_t i = 0; i < run.repeat; ++i) {
      const LayerPlanner planner(tensors, naming, names, kind,
                                 static_cast<std::uint32_t>(layers.size()));
      ATTN_ASSIGN_OR_RETURN(PlannedLayer layer, planner.Plan(run, hidden_size));
      layers.push_back(std::move(layer));
    }
  }
  return layers;
}

}  // namespace

absl::StatusOr<std::vector<PlannedLayer>> PlanSelfAttention(const ModelTensors& tensors,
                                                            const LayerStack& stack,
                                                            const StackTensors& names) {
  return PlanLayers(tensors, stack.self_attention, stack.hidden_size, AttentionKind::kSelf, names);
}

absl::StatusOr<std::vector<PlannedLayer>> PlanCrossAttention(const ModelTensors& tensors,
                                                             const LayerStack& stack,
                                                             const StackTensors& names) {
  return PlanLayers(tensors, stack.cross_attention, stack.hidden_size, AttentionKind::kCross,
                    names);
}

void ReadSinks(const std::vector<PlannedLayer>& layers, LayerStack& stack) {
  std::vector<LayerSpec> runs;
  std::size_t layer = 0;
  for (const LayerSpec& run : stack.self_attention) {
    if (layers[layer].sinks.parts.empty()) {
      layer += runs.emplace_back(run).repeat;
      continue;
    }
    for (std::uint32_t i = 0; i < run.repeat; ++i) {
      LayerSpec& own = runs.emplace_back(run);
      own.repeat = 1;
      own.options.sink_logits = Floats(*layers[layer++].sinks.parts.front().entry, run.num_heads);
    }
  }
  stack.self_attention = std::move(runs);
}

DType StoredDType(const std::vector<PlannedLayer>& layers) {
  DType dtype = DType::kUnspecified;
  for (const PlannedLayer& layer : layers) {
    for (const PlannedParameter* parameter :
         {&layer.query_key_value_weight, &layer.query_key_value_bias, &layer.key_value_weight,
          &layer.key_value_bias, &layer.output_weight, &layer.output_bias}) {
      for (const PlannedParameter::Part& part : parameter->parts) {
        if (part.entry == nullptr || part.entry->dtype == dtype) continue;
        if (dtype != DType::kUnspecified) return DType::kFloat32;
        dtype = part.entry->dtype;
      }
    }
  }
  return dtype;
}

absl::StatusOr<LayerWeights> LoadLayer(const PlannedLayer& plan, DType dtype,
                                       const SliceRunner& run_slice) {
  LayerWeights weights;
  ATTN_ASSIGN_OR_RETURN(weights.query_key_value.weight,
                        LoadParameter(plan.query_key_value_weight, dtype, run_slice));
  ATTN_ASSIGN_OR_RETURN(weights.query_key_value.bias,
                        LoadParameter(plan.query_key_value_bias, dtype, run_slice));
  ATTN_ASSIGN_OR_RETURN(weights.key_value.weight,
                        LoadParameter(plan.key_value_weight, dtype, run_slice));
  ATTN_ASSIGN_OR_RETURN(weights.key_value.bias,
                        LoadParameter(plan.key_value_bias, dtype, run_slice));
  ATTN_ASSIGN_OR_RETURN(weights.output.weight, LoadParameter(plan.output_weight, dtype, run_slice));
  ATTN_ASSIGN_OR_RETURN(weights.output.bias, LoadParameter(plan.output_bias, dtype, run_slice));
  ATTN_ASSIGN_OR_RETURN(weights.query_norm,
                        LoadNorm(plan.query_norm, plan.norm_offset, dtype, run_slice));
  ATTN_ASSIGN_OR_RETURN(weights.key_norm,
                        LoadNorm(plan.key_norm, plan.norm_offset, dtype, run_slice));
  weights.norm_epsilon = plan.norm_epsilon;
  return weights;
}

}  // namespace attn
