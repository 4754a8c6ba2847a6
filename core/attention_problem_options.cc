// The part of ProblemBuilder that says which keys a query sees, and how: options and masks.
#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "core/attention_problem_builder.h"
#include "core/error.h"

namespace attn {
namespace {

kernels::MaskType ToMaskType(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return kernels::MaskType::kFloat32;
    case DType::kFloat16:
      return kernels::MaskType::kFloat16;
    case DType::kBFloat16:
      return kernels::MaskType::kBFloat16;
    default:
      return kernels::MaskType::kBool;
  }
}

// A byte that is neither 0 nor 1 is no bool to LibTorch: implementations would disagree about it.
absl::Status CheckBooleans(const TensorView& view) {
  const auto* const bytes = static_cast<const unsigned char*>(view.data);
  unsigned char all = 0;
  for (std::size_t i = 0; i < view.bytes(); ++i) all = static_cast<unsigned char>(all | bytes[i]);
  if (all <= 1) return absl::OkStatus();
  return InvalidField(
      "attention_mask",
      "attention_mask has a byte that is neither 0 nor 1, but a bool is one of them");
}

}  // namespace

absl::Status ProblemBuilder::ReadHeadValues(const char* field, const std::vector<float>& given,
                                            bool finite, std::vector<float>& values) {
  if (given.empty()) return absl::OkStatus();
  if (static_cast<std::int64_t>(given.size()) != query_.heads) {
    return InvalidField(
        field, absl::StrCat(field, " has ", given.size(), " values for ", query_.heads, " heads"));
  }
  for (float value : given) {
    const bool allowed = std::isfinite(value) || (!finite && value < 0.0f);  // -inf: no sink at all
    if (!allowed) return InvalidField(field, absl::StrCat(field, " has a value of ", value));
  }
  values = given;
  return absl::OkStatus();
}

absl::Status ProblemBuilder::CheckOptions() {
  if (inputs_.output_dtype != DType::kUnspecified && !IsFloating(inputs_.output_dtype)) {
    return InvalidField("output_dtype",
                        absl::StrCat("output_dtype is ", DTypeName(inputs_.output_dtype),
                                     ", but must be floating"));
  }
  const AttentionOptions options =
      layer_ == nullptr ? inputs_.options : Override(layer_->options, inputs_.options);
  kernels::AttentionArgs& args = problem_.args_;
  const double scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(query_.dim)));
  if (!std::isfinite(scale) || std::abs(scale) > std::numeric_limits<float>::max()) {
    return InvalidField("options.scale",
                        absl::StrCat("options.scale is ", scale, ", but must be finite"));
  }
  const double soft_cap = options.soft_cap.value_or(0.0);
  if (!(soft_cap >= 0.0) || soft_cap > std::numeric_limits<float>::max()) {
    return InvalidField("options.soft_cap", absl::StrCat("options.soft_cap is ", soft_cap,
                                                         ", but must be finite and not negative"));
  }
  for (const auto& [field, given, window] :
       {std::tuple("options.window_left", &options.window_left, &args.window_left),
        std::tuple("options.window_right", &options.window_right, &args.window_right)}) {
    const std::int64_t value = given->value_or(-1);
    if (value < -1) {
      return InvalidField(field,
                          absl::StrCat(field, " is ", value, ", but must be -1 (off) or more"));
    }
    *window = std::min(value, kMaxPosition);
  }
  args.scale = static_cast<float>(scale);
  args.soft_cap = static_cast<float>(soft_cap);
  args.is_causal = options.is_causal.value_or(false);
  ATTN_RETURN_IF_ERROR(ReadHeadValues("options.alibi_slopes",
                                      options.alibi_slopes.value_or(std::vector<float>()), true,
                                      problem_.alibi_slopes_));
  return ReadHeadValues("options.sink_logits", options.sink_logits.value_or(std::vector<float>()),
                        false, problem_.sink_logits_);
}

absl::Status ProblemBuilder::CheckMask() {
  const TensorView& view = inputs_.attention_mask;
  if (!view.defined()) return absl::OkStatus();
  constexpr char kField[] = "attention_mask";
  const bool padding = view.dtype == DType::kInt64;
  if (!padding && !IsFloating(view.dtype) && view.dtype != DType::kBool) {
    return InvalidField(kField,
                        absl::StrCat("attention_mask is ", DTypeName(view.dtype),
                                     ", but must be bool, floating, or int64 [batch, kv_len]"));
  }
  if (view.rank < 2 || view.rank > 4 || (padding && view.rank != 2)) {
    return InvalidField(kField, absl::StrCat("attention_mask has shape ", ShapeText(view),
                                             ", but must have rank ", padding ? "2" : "2 to 4"));
  }
  // Axes from the left: batch, heads, q_len, kv_len; a padding mask has the outer two.
  std::array<std::int64_t, 4> strides{};
  // A mask may be as long as the longest row or as the padded tensors; its surplus is never looked
  // at.
  const std::array<std::int64_t, 4> wanted = {batch_, query_.heads, q_len_, kv_len_};
  const std::array<std::int64_t, 4> padded = {batch_, query_.heads, padded_q_len_, padded_kv_len_};
  for (int axis = 0; axis < view.rank; ++axis) {
    const auto target = static_cast<std::size_t>(padding ? 3 * axis : axis + 4 - view.rank);
    const std::int64_t extent = view.extent(axis);
    const bool hides_rest = target == 3 && extent > 1 && extent < kv_len_;
    const bool fits = extent >= wanted[target] && extent <= padded[target];
    if (extent != 1 && !fits && !hides_rest) {
      return InvalidField(kField, absl::StrCat("attention_mask has shape ", ShapeText(view),
                                               ", which does not broadcast to [", batch_, ", ",
                                               query_.heads, ", ", q_len_, ", ", kv_len_, "]"));
    }
    strides[target] = extent == 1 ? 0 : view.stride(axis);
  }
  const std::int64_t last = view.extent(view.rank - 1);
  kernels::Mask& mask = problem_.args_.mask;
  mask.type = ToMaskType(view.dtype);
  mask.data = view.data;
  mask.batch_stride = strides[0];
  mask.head_stride = strides[1];
  mask.query_stride = strides[2];
  mask.key_stride = strides[3];
  mask.kv_extent = last == 1 ? kv_len_ : std::min(last, kv_len_);
  if (padding) return CopyPaddingMask();
  return view.dtype == DType::kBool ? CheckBooleans(view) : absl::OkStatus();
}

absl::Status ProblemBuilder::CopyPaddingMask() {
  const TensorView& view = inputs_.attention_mask;
  const auto count = static_cast<std::size_t>(view.num_elements());
  problem_.padding_mask_.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    std::int64_t value = 0;
    __builtin_memcpy(&value, static_cast<const char*>(view.data) + i * sizeof(value),
                     sizeof(value));
    if (value != 0 && value != 1) {
      return InvalidField("attention_mask", absl::StrCat("attention_mask has a value of ", value,
                                                         ", but an int64 mask holds 0 and 1"));
    }
    problem_.padding_mask_[i] = static_cast<std::uint8_t>(value);
  }
  return absl::OkStatus();
}

}  // namespace attn
