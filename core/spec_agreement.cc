#include "core/spec_agreement.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

absl::Status Differs(const std::string& field, const std::string& asked, const std::string& found) {
  return InvalidField(field, absl::StrCat(field, " is ", asked, ", which must be unset or the ",
                                          found, " of the model's directory"));
}

// Compares one field after the other; the first that differs is kept.
class Comparison {
 public:
  explicit Comparison(std::string prefix) : prefix_(std::move(prefix)) {}

  // Zero is unset.
  void Number(const char* name, std::uint64_t asked, std::uint64_t found) {
    if (asked != 0 && asked != found) Note(name, absl::StrCat(asked), absl::StrCat(found));
  }
  void Option(const char* name, const std::optional<std::int64_t>& asked, std::int64_t found) {
    if (asked && *asked != found) Note(name, absl::StrCat(*asked), absl::StrCat(found));
  }
  void Option(const char* name, const std::optional<bool>& asked, bool found) {
    if (asked && *asked != found) Note(name, *asked ? "true" : "false", found ? "true" : "false");
  }
  // Values that went through a float or were printed by someone are the same to within a part in a
  // million.
  void Option(const char* name, const std::optional<double>& asked, double found) {
    if (asked && !(std::abs(*asked - found) <= 1e-6 * std::abs(found))) {
      Note(name, absl::StrCat(*asked), absl::StrCat(found));
    }
  }
  void Option(const char* name, const std::optional<std::vector<float>>& asked,
              const std::optional<std::vector<float>>& found) {
    const std::size_t known = found ? found->size() : 0;
    if (asked && (asked->size() != known || (found && *asked != *found))) {
      Note(name, absl::StrCat(asked->size(), " values"), absl::StrCat(known, " values"));
    }
  }
  void Name(const char* name, Modality asked, Modality found) {
    if (asked != Modality::kUnspecified && asked != found) {
      Note(name, ModalityName(asked), ModalityName(found));
    }
  }
  void Note(const char* name, const std::string& asked, const std::string& found) {
    if (status_.ok()) status_ = Differs(prefix_ + name, asked, found);
  }

  const absl::Status& status() const { return status_; }

 private:
  std::string prefix_;
  absl::Status status_;
};

void CompareRotary(const RotaryEmbedding& asked, const std::optional<RotaryEmbedding>& found,
                   Comparison& comparison) {
  if (!found) return comparison.Note("rotary", "set", "absence");
  if (asked.theta != 0.0)
    comparison.Option("rotary.theta", std::optional(asked.theta), found->theta);
  comparison.Number("rotary.rotary_dim", asked.rotary_dim, found->rotary_dim);
  if (asked.interleaved)
    comparison.Option("rotary.interleaved", std::optional(true), found->interleaved);
  if (!asked.scaling.empty() && asked.scaling != found->scaling) {
    comparison.Note("rotary.scaling", asked.scaling, found->scaling);
  }
  const auto same = [&](const char* name, const auto& a, const auto& b) {
    if (!a.empty() && a != b) comparison.Note(name, "different", "value");
  };
  same("rotary.scaling_parameters", asked.scaling_parameters, found->scaling_parameters);
  same("rotary.short_factor", asked.short_factor, found->short_factor);
  same("rotary.long_factor", asked.long_factor, found->long_factor);
  same("rotary.axis_sections", asked.axis_sections, found->axis_sections);
  if (asked.frequencies_per_axis) {
    comparison.Option("rotary.frequencies_per_axis", std::optional(true),
                      found->frequencies_per_axis);
  }
}

absl::Status CompareLayer(const std::string& prefix, const LayerSpec& asked,
                          const LayerSpec& found) {
  Comparison comparison(prefix);
  comparison.Number("num_heads", asked.num_heads, found.num_heads);
  comparison.Number("num_kv_heads", asked.num_kv_heads, found.num_kv_heads);
  comparison.Number("head_dim", asked.head_dim, found.head_dim);
  comparison.Number("value_dim", asked.value_dim, found.value_dim);
  comparison.Number("encoder_hidden_size", asked.encoder_hidden_size, found.encoder_hidden_size);
  const AttentionOptions& want = asked.options;
  const AttentionOptions& have = found.options;
  comparison.Option("options.scale", want.scale,
                    have.scale.value_or(1.0 / std::sqrt(static_cast<double>(found.head_dim))));
  comparison.Option("options.is_causal", want.is_causal, have.is_causal.value_or(false));
  comparison.Option("options.window_left", want.window_left, have.window_left.value_or(-1));
  comparison.Option("options.window_right", want.window_right, have.window_right.value_or(-1));
  comparison.Option("options.soft_cap", want.soft_cap, have.soft_cap.value_or(0.0));
  comparison.Option("options.alibi_slopes", want.alibi_slopes, have.alibi_slopes);
  comparison.Option("options.sink_logits", want.sink_logits, have.sink_logits);
  if (asked.rotary) CompareRotary(*asked.rotary, found.rotary, comparison);
  return comparison.status();
}

std::uint64_t Repeat(const LayerSpec& run) { return std::max(run.repeat, 1u); }

std::uint64_t CountLayers(const std::vector<LayerSpec>& runs) {
  std::uint64_t count = 0;
  for (const LayerSpec& run : runs) count += Repeat(run);
  return count;
}

// Walks both lists run by run, never layer by layer: a caller may ask for a run of four billion.
absl::Status CompareLayers(const std::string& field, const std::vector<LayerSpec>& asked,
                           const std::vector<LayerSpec>& found) {
  if (asked.empty()) return absl::OkStatus();
  const std::uint64_t count = CountLayers(asked);
  if (count != CountLayers(found)) {
    return Differs(field, absl::StrCat(count, " layers"),
                   absl::StrCat(CountLayers(found), " layers"));
  }
  std::size_t i = 0;
  std::size_t j = 0;
  std::uint64_t i_left = Repeat(asked[0]);
  std::uint64_t j_left = Repeat(found[0]);
  while (true) {
    ATTN_RETURN_IF_ERROR(CompareLayer(absl::StrCat(field, "[", i, "]."), asked[i], found[j]));
    const std::uint64_t step = std::min(i_left, j_left);
    i_left -= step;
    j_left -= step;
    if (i_left == 0 && ++i == asked.size()) return absl::OkStatus();
    if (j_left == 0) ++j;
    if (i_left == 0) i_left = Repeat(asked[i]);
    if (j_left == 0) j_left = Repeat(found[j]);
  }
}

}  // namespace

absl::Status CheckAgreement(const ModelSpec& asked, const ModelSpec& found) {
  Comparison model("");
  model.Name("modality", asked.modality, found.modality);
  ATTN_RETURN_IF_ERROR(model.status());
  if (asked.stacks.empty()) return absl::OkStatus();
  if (asked.stacks.size() != found.stacks.size()) {
    return Differs("stacks", absl::StrCat(asked.stacks.size(), " stacks"),
                   absl::StrCat(found.stacks.size(), " stacks"));
  }
  for (std::size_t i = 0; i < asked.stacks.size(); ++i) {
    const LayerStack& want = asked.stacks[i];
    const LayerStack& have = found.stacks[i];
    const std::string prefix = absl::StrCat("stacks[", i, "].");
    Comparison stack(prefix);
    if (!want.name.empty() && want.name != have.name) {
      stack.Note("name", absl::StrCat("\"", want.name, "\""), absl::StrCat("\"", have.name, "\""));
    }
    stack.Name("modality", want.modality, have.modality);
    stack.Number("hidden_size", want.hidden_size, have.hidden_size);
    stack.Number("max_positions", want.max_positions, have.max_positions);
    ATTN_RETURN_IF_ERROR(stack.status());
    ATTN_RETURN_IF_ERROR(
        CompareLayers(prefix + "self_attention", want.self_attention, have.self_attention));
    ATTN_RETURN_IF_ERROR(
        CompareLayers(prefix + "cross_attention", want.cross_attention, have.cross_attention));
  }
  return absl::OkStatus();
}

}  // namespace attn
