#include "core/families/rotary_config.h"

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/families/family.h"
#include "core/rotary_frequencies.h"

namespace attn {
namespace {

constexpr char kOriginalLength[] = "original_max_position_embeddings";
constexpr char kLength[] = "max_position_embeddings";
constexpr char kSections[] = "mrope_section";
constexpr double kMaxTheta = 1e30;
constexpr double kMaxParameter = 1e9;

// Reads one RotaryEmbedding: `scaling_` is the object of rope_parameters or rope_scaling, or
// nothing where the config has neither.
class RotaryConfig {
 public:
  RotaryConfig(ConfigReader& config, const RotaryDefaults& defaults)
      : config_(config), defaults_(defaults) {}

  absl::StatusOr<RotaryEmbedding> Read(std::uint32_t head_dim) {
    ATTN_RETURN_IF_ERROR(OpenScaling());
    ATTN_RETURN_IF_ERROR(ReadTheta());
    ATTN_RETURN_IF_ERROR(ReadRotaryDim(head_dim));
    ATTN_RETURN_IF_ERROR(ReadScalingName());
    ATTN_RETURN_IF_ERROR(ReadParameters());
    ATTN_RETURN_IF_ERROR(ReadFactors());
    ATTN_RETURN_IF_ERROR(ReadSections());
    return embedding_;
  }

 private:
  // transformers takes rope_scaling first where a file has both.
  absl::Status OpenScaling() {
    if (defaults_.layer_type != nullptr) return OpenLayerType();
    for (const char* name : {"rope_scaling", "rope_parameters"}) {
      if (!config_.Has(name)) {
        config_.Ignore(name);
        continue;
      }
      ATTN_ASSIGN_OR_RETURN(ConfigReader object, config_.RequiredObject(name));
      if (!scaling_ && !object.Names().empty()) scaling_ = object;
    }
    return absl::OkStatus();
  }

  // rope_parameters holds an object for each kind of layers. Older files have rope_scaling for one
  // kind instead; how the two would combine in one file is not known.
  absl::Status OpenLayerType() {
    for (const char* name : {"rope_scaling", "rope_parameters"}) config_.Ignore(name);
    const bool scaling = config_.Has("rope_scaling");
    if (!config_.Has("rope_parameters")) {
      if (!scaling || !defaults_.scaled) return absl::OkStatus();
      ATTN_ASSIGN_OR_RETURN(scaling_, config_.RequiredObject("rope_scaling"));
      return absl::OkStatus();
    }
    if (scaling) return config_.Unsupported("rope_scaling");
    ATTN_ASSIGN_OR_RETURN(ConfigReader kinds, config_.RequiredObject("rope_parameters"));
    for (const std::string& name : kinds.Names()) {
      if (name != "full_attention" && name != "sliding_attention") return kinds.Unsupported(name);
    }
    if (!kinds.Has(defaults_.layer_type)) return absl::OkStatus();
    ATTN_ASSIGN_OR_RETURN(scaling_, kinds.RequiredObject(defaults_.layer_type));
    return absl::OkStatus();
  }

  bool ScalingHas(const char* name) const { return scaling_ && scaling_->Has(name); }

  // The object's own field wins over the one beside it.
  absl::Status ReadTheta() {
    ATTN_ASSIGN_OR_RETURN(embedding_.theta,
                          config_.NumberOr(defaults_.theta_field, defaults_.theta, 1.0, kMaxTheta));
    if (!scaling_) return absl::OkStatus();
    ATTN_ASSIGN_OR_RETURN(embedding_.theta,
                          scaling_->NumberOr("rope_theta", embedding_.theta, 1.0, kMaxTheta));
    return absl::OkStatus();
  }

  absl::Status ReadRotaryDim(std::uint32_t head_dim) {
    constexpr char kName[] = "partial_rotary_factor";
    ATTN_ASSIGN_OR_RETURN(double factor, config_.NumberOr(kName, 1.0, 0.0, 1.0));
    ConfigReader* reader = &config_;
    if (ScalingHas(kName)) {
      reader = &*scaling_;
      ATTN_ASSIGN_OR_RETURN(factor, reader->NumberOr(kName, 1.0, 0.0, 1.0));
    }
    if (factor != 1.0 && !defaults_.partial) return reader->Unsupported(kName);
    embedding_.rotary_dim = static_cast<std::uint32_t>(head_dim * factor);
    if (embedding_.rotary_dim >= 2 && embedding_.rotary_dim % 2 == 0) return absl::OkStatus();
    const std::string rule =
        absl::StrCat("which makes ", embedding_.rotary_dim, " of ", head_dim,
                     " dimensions rotate, but they must be an even number above 0");
    return reader->Has(kName) ? reader->Bad(kName, rule) : config_.Bad("head_dim", rule);
  }

  absl::Status ReadScalingName() {
    if (!scaling_) return absl::OkStatus();
    const char* field = ScalingHas("rope_type") ? "rope_type" : "type";
    ATTN_ASSIGN_OR_RETURN(std::string name, scaling_->StringOr(field, "default"));
    scaling_->Ignore("type");
    // By name a scaling, but what it says is how axes share the frequencies.
    if (name == "mrope" && !defaults_.axis_sections.empty()) name = "default";
    if (defaults_.longrope_alone) {
      if (name == "su" || name == "yarn") name = "longrope";
      if (name != "longrope" && name != "default") return scaling_->Unsupported(field);
    }
    // The empty name is ours, not a config's.
    if (name.empty() || (name != "default" && FindRotaryScaling(name) == nullptr)) {
      return scaling_->Unsupported(field);
    }
    if (name != "default") embedding_.scaling = name;
    return absl::OkStatus();
  }

  absl::Status ReadParameters() {
    const RotaryScalingNames& names = *FindRotaryScaling(embedding_.scaling);
    ATTN_RETURN_IF_ERROR(ReadLengths());
    for (const char* name : names.required) {
      ATTN_RETURN_IF_ERROR(ReadParameter(name, true));
    }
    for (const char* name : names.optional) {
      ATTN_RETURN_IF_ERROR(ReadParameter(name, false));
    }
    if (!scaling_) return absl::OkStatus();
    // What another scaling would read is known to mean nothing to this one.
    for (const std::string& name : scaling_->Names()) {
      const bool known = name == "rope_theta" || name == "rope_type" || name == "type" ||
                         name == "partial_rotary_factor" || name == "short_factor" ||
                         name == "long_factor" || IsRotaryParameter(name) ||
                         (name == kSections && !defaults_.axis_sections.empty());
      if (!known && scaling_->Has(name)) return scaling_->Unsupported(name);
    }
    return absl::OkStatus();
  }

  absl::Status ReadLengths() {
    ATTN_ASSIGN_OR_RETURN(positions_, config_.IntOr(kLength, 0, 1, kMaxPositions));
    original_ = defaults_.original_positions;
    if (ScalingHas(kOriginalLength) && original_ == 0) {
      ATTN_ASSIGN_OR_RETURN(original_, scaling_->RequiredInt(kOriginalLength, 1, kMaxPositions));
    }
    if (original_ == 0) original_ = positions_;
    // Beside the object it wins, which is where Phi-3 has it.
    ATTN_ASSIGN_OR_RETURN(original_, config_.IntOr(kOriginalLength, original_, 1, kMaxPositions));
    return absl::OkStatus();
  }

  absl::Status ReadParameter(const std::string& name, bool required) {
    double value = 0.0;
    if (name == kLength || name == kOriginalLength) {
      value = name == kLength ? positions_ : original_;
      if (value == 0.0) return config_.Missing(kLength);
    } else if (name == "truncate") {
      ATTN_ASSIGN_OR_RETURN(value, scaling_->BoolOr(name, true));
    } else if (ScalingHas(name.c_str())) {
      ATTN_ASSIGN_OR_RETURN(value, scaling_->NumberOr(name, 0.0, 0.0, kMaxParameter));
    } else if (!required) {
      return absl::OkStatus();
    } else if (name == "factor" &&
               (embedding_.scaling == "yarn" || embedding_.scaling == "longrope")) {
      if (positions_ == 0) return config_.Missing(kLength);
      value = static_cast<double>(positions_) / static_cast<double>(original_);
    } else {
      return scaling_->Missing(name);
    }
    embedding_.scaling_parameters[name] = value;
    return absl::OkStatus();
  }

  absl::Status ReadFactors() {
    if (embedding_.scaling != "longrope") return absl::OkStatus();
    const std::size_t pairs = embedding_.rotary_dim / 2;
    ATTN_ASSIGN_OR_RETURN(embedding_.short_factor,
                          scaling_->RequiredNumbers("short_factor", pairs, 0.0, kMaxParameter));
    ATTN_ASSIGN_OR_RETURN(embedding_.long_factor,
                          scaling_->RequiredNumbers("long_factor", pairs, 0.0, kMaxParameter));
    return absl::OkStatus();
  }

  absl::Status ReadSections() {
    embedding_.axis_sections.assign(defaults_.axis_sections.begin(), defaults_.axis_sections.end());
    if (embedding_.axis_sections.empty()) return absl::OkStatus();
    if (ScalingHas(kSections)) {
      ATTN_ASSIGN_OR_RETURN(
          const std::vector<double> sections,
          scaling_->RequiredNumbers(kSections, embedding_.axis_sections.size(), 1.0, kMaxHeadDim));
      for (std::size_t i = 0; i < sections.size(); ++i) {
        if (sections[i] != std::floor(sections[i])) {
          return scaling_->Bad(kSections, "whose entries must be whole numbers");
        }
        embedding_.axis_sections[i] = static_cast<std::uint32_t>(sections[i]);
      }
    }
    std::uint64_t sum = 0;
    for (std::uint32_t section : embedding_.axis_sections) sum += section;
    const std::uint64_t pairs = embedding_.rotary_dim / 2;
    if (sum == pairs) return absl::OkStatus();
    return (ScalingHas(kSections) ? *scaling_ : config_)
        .Bad(kSections, absl::StrCat("which makes ", sum, " frequencies, but there are ", pairs));
  }

  ConfigReader& config_;
  const RotaryDefaults& defaults_;
  std::optional<ConfigReader> scaling_;
  RotaryEmbedding embedding_;
  std::uint32_t positions_ = 0;
  std::uint32_t original_ = 0;
};

}  // namespace

absl::StatusOr<RotaryEmbedding> ReadRotary(ConfigReader& config, std::uint32_t head_dim,
                                           const RotaryDefaults& defaults) {
  return RotaryConfig(config, defaults).Read(head_dim);
}

}  // namespace attn
