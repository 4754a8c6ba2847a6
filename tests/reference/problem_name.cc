// Names of cases, apart from the building of them.
#include <sstream>
#include <string>

#include "tests/reference/problem_builder.h"

namespace attn::reference {
namespace {

using kernels::ElementType;
using kernels::MaskType;
using kernels::ScoreStage;

const char* TypeName(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return "f32";
    case ElementType::kFloat16:
      return "f16";
    case ElementType::kBFloat16:
      return "bf16";
    case ElementType::kInt8:
      return "i8";
  }
  return "";
}

const char* MaskName(MaskType type) {
  switch (type) {
    case MaskType::kNone:
      return "none";
    case MaskType::kBool:
      return "bool";
    case MaskType::kFloat32:
      return "f32";
    case MaskType::kFloat16:
      return "f16";
    case MaskType::kBFloat16:
      return "bf16";
  }
  return "";
}

const char* StageName(ScoreStage stage) {
  switch (stage) {
    case ScoreStage::kNone:
      return "none";
    case ScoreStage::kScaled:
      return "scaled";
    case ScoreStage::kSoftCapped:
      return "capped";
    case ScoreStage::kMasked:
      return "masked";
    case ScoreStage::kProbabilities:
      return "probabilities";
  }
  return "";
}

// gtest allows letters, digits and underscores alone.
std::string Number(int64_t value) {
  return value < 0 ? "m" + std::to_string(-value) : std::to_string(value);
}

}  // namespace

std::string CaseName(const ProblemCase& c) {
  std::ostringstream name;
  name << "b" << c.batch << "_h" << c.heads << "_kv" << c.kv_heads << "_q" << c.q_len << "_k"
       << c.kv_len << "_d" << c.head_dim;
  if (c.value_dim != 0 && c.value_dim != c.head_dim) name << "_v" << c.value_dim;
  if (c.dtype != ElementType::kFloat32) name << "_" << TypeName(c.dtype);
  if (c.output_dtype != c.dtype) name << "_to_" << TypeName(c.output_dtype);
  if (c.causal) name << "_causal";
  if (c.window_left >= 0) name << "_left" << c.window_left;
  if (c.window_right >= 0) name << "_right" << c.window_right;
  if (c.first_query_position) name << "_at" << Number(*c.first_query_position);
  if (c.soft_cap > 0) name << "_cap" << static_cast<int>(c.soft_cap);
  if (c.alibi) name << "_alibi";
  if (c.sinks) name << "_sinks";
  if (c.mask != MaskType::kNone) {
    name << "_mask_" << MaskName(c.mask) << "_rank" << c.mask_rank;
    if (c.mask_extent >= 0) name << "_extent" << c.mask_extent;
    if (c.mask_broadcasts_keys) name << "_broadcast";
  }
  if (c.spans != 1) name << "_spans" << c.spans;
  if (c.ragged) name << "_ragged";
  if (c.layout == Layout::kHeadsFirst) name << "_heads_first";
  if (c.layout == Layout::kPacked) name << "_packed";
  if (c.stage != ScoreStage::kNone) name << "_" << StageName(c.stage);
  if (c.lse) name << "_lse";
  if (c.logit_magnitude != 1) name << "_logits" << static_cast<int64_t>(c.logit_magnitude);
  if (c.misaligned) name << "_misaligned";
  if (c.hidden_keys_nan) name << "_hidden_nan";
  if (c.nan_key >= 0) name << "_nan_key" << c.nan_key;
  if (c.infinite_value >= 0) name << "_infinite_value" << c.infinite_value;
  if (c.seed != 1) name << "_seed" << c.seed;
  return name.str();
}

void PrintTo(const ProblemCase& c, std::ostream* out) { *out << CaseName(c); }

}  // namespace attn::reference
