#include "core/rotary_frequencies.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

constexpr char kOriginalLength[] = "original_max_position_embeddings";
constexpr char kLength[] = "max_position_embeddings";
// Beyond the last one a float32 position is no longer exact, and no model comes near.
constexpr double kMaxLength = 1e9;
// Bounds within which no angle overflows, so that every cosine is a number.
constexpr double kMinParameter = 1e-9;
constexpr double kMaxParameter = 1e9;
constexpr double kMaxTheta = 1e30;

constexpr const char* kLinear[] = {"factor"};
constexpr const char* kDynamic[] = {"factor", kLength};
constexpr const char* kYarn[] = {"factor", kOriginalLength};
constexpr const char* kYarnOptional[] = {"attention_factor", "beta_fast",      "beta_slow",
                                         "mscale",           "mscale_all_dim", "truncate"};
constexpr const char* kLlama3[] = {"factor", "low_freq_factor", "high_freq_factor",
                                   kOriginalLength};
constexpr const char* kLongRope[] = {"factor", kOriginalLength};
constexpr const char* kLongRopeOptional[] = {"attention_factor"};

// In the order of RotaryFrequencies::Kind.
constexpr RotaryScalingNames kScalings[] = {
    {"", {}, {}},
    {"linear", kLinear, {}},
    {"dynamic", kDynamic, {}},
    {"yarn", kYarn, kYarnOptional},
    {"llama3", kLlama3, {}},
    {"longrope", kLongRope, kLongRopeOptional},
};

absl::Status BadParameter(const std::string& field, const std::string& name, double value,
                          const std::string& rule) {
  const std::string path = absl::StrCat(field, ".scaling_parameters.", name);
  return InvalidField(path, absl::StrCat(path, " is ", value, ", but must be ", rule));
}

bool Holds(std::span<const char* const> names, const std::string& name) {
  return std::any_of(names.begin(), names.end(), [&](const char* known) { return name == known; });
}

// Every name is known, none is missing, and each value lies where its formula is defined.
absl::Status CheckParameters(const std::string& field, const RotaryScalingNames& names,
                             const std::map<std::string, double>& parameters) {
  for (const auto& [name, value] : parameters) {
    if (!Holds(names.required, name) && !Holds(names.optional, name)) {
      const std::string path = absl::StrCat(field, ".scaling_parameters.", name);
      return InvalidField(
          path, absl::StrCat(path, " is not a parameter of scaling '", names.scaling, "'"));
    }
    if (name == "truncate") {
      if (value != 0.0 && value != 1.0) return BadParameter(field, name, value, "0 or 1");
    } else if (name == kOriginalLength || name == kLength) {
      if (!(value >= 1.0 && value <= kMaxLength) || value != std::floor(value)) {
        return BadParameter(field, name, value, "a whole number from 1 to 1e9");
      }
    } else if (name == "mscale" || name == "mscale_all_dim" || name == "beta_fast" ||
               name == "beta_slow" || name == "attention_factor") {
      if (!(value >= 0.0 && value <= kMaxParameter)) {
        return BadParameter(field, name, value, "a number from 0 to 1e9");
      }
    } else if (!(value >= kMinParameter && value <= kMaxParameter)) {
      return BadParameter(field, name, value, "a number from 1e-9 to 1e9");
    }
  }
  for (const char* name : names.required) {
    if (parameters.contains(name)) continue;
    const std::string path = absl::StrCat(field, ".scaling_parameters.", name);
    return InvalidField(
        path, absl::StrCat(path, " is missing, which scaling '", names.scaling, "' needs"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> Factors(const std::string& field,
                                           const std::vector<double>& factors) {
  std::vector<float> result;
  for (double factor : factors) {
    if (!(factor >= kMinParameter && factor <= kMaxParameter)) {
      return InvalidField(field, absl::StrCat(field, " has an entry of ", factor,
                                              ", but each must be from 1e-9 to 1e9"));
    }
    result.push_back(static_cast<float>(factor));
  }
  return result;
}

float Power(float base, float exponent) {
  return static_cast<float>(std::pow(static_cast<double>(base), static_cast<double>(exponent)));
}

// theta ^ (2i / dim), in float32 as transformers has it.
float Wavelength(double theta, std::int64_t dim, std::size_t i) {
  return Power(static_cast<float>(theta), static_cast<float>(2 * i) / static_cast<float>(dim));
}

// The dimension whose wavelength turns `rotations` times within `length` positions
// (arXiv:2309.00071, appendix A.2).
double CorrectionDim(double rotations, std::int64_t dim, double theta, double length) {
  return static_cast<double>(dim) * std::log(length / (rotations * 2.0 * std::numbers::pi)) /
         (2.0 * std::log(theta));
}

double MagnitudeScale(double scale, double mscale) {
  return scale <= 1.0 ? 1.0 : 0.1 * mscale * std::log(scale) + 1.0;
}

}  // namespace

const RotaryScalingNames* FindRotaryScaling(const std::string& scaling) {
  for (const RotaryScalingNames& names : kScalings) {
    if (scaling == names.scaling) return &names;
  }
  return nullptr;
}

bool IsRotaryParameter(const std::string& name) {
  return std::any_of(std::begin(kScalings), std::end(kScalings),
                     [&](const RotaryScalingNames& names) {
                       return Holds(names.required, name) || Holds(names.optional, name);
                     });
}

absl::StatusOr<RotaryFrequencies> RotaryFrequencies::Create(const std::string& field,
                                                            const RotaryEmbedding& embedding,
                                                            std::int64_t positions) {
  RotaryFrequencies frequencies;
  ATTN_RETURN_IF_ERROR(frequencies.Read(field, embedding, positions));
  return frequencies;
}

double RotaryFrequencies::Parameter(const std::string& name, double fallback) const {
  const auto found = parameters_.find(name);
  return found == parameters_.end() ? fallback : found->second;
}

absl::Status RotaryFrequencies::Read(const std::string& field, const RotaryEmbedding& embedding,
                                     std::int64_t positions) {
  const RotaryScalingNames* names = FindRotaryScaling(embedding.scaling);
  if (names == nullptr) {
    return MakeError(
        absl::StatusCode::kUnimplemented, "UNSUPPORTED_MODEL",
        absl::StrCat(field, ".scaling is '", embedding.scaling, "', which is not supported"),
        {{"field", absl::StrCat(field, ".scaling")}, {"value", embedding.scaling}});
  }
  const double smallest = embedding.scaling == "yarn" ? std::nextafter(1.0, 2.0) : 1.0;
  if (!(embedding.theta >= smallest && embedding.theta <= kMaxTheta)) {
    return InvalidField(
        absl::StrCat(field, ".theta"),
        absl::StrCat(field, ".theta is ", embedding.theta,
                     ", but must be a number from 1 to 1e30, and for yarn above 1"));
  }
  theta_ = embedding.theta;
  kind_ = static_cast<Kind>(names - kScalings);
  parameters_ = embedding.scaling_parameters;
  for (const char* length : {kOriginalLength, kLength}) {
    if (positions > 0 && Holds(names->required, length)) {
      parameters_.emplace(length, static_cast<double>(positions));
    }
  }
  ATTN_RETURN_IF_ERROR(CheckParameters(field, *names, parameters_));
  factor_ = Parameter("factor", 1.0);
  length_ = Parameter(kind_ == Kind::kDynamic ? kLength : kOriginalLength, 0.0);
  if (kind_ == Kind::kDynamic && factor_ < 1.0) {
    return BadParameter(field, "factor", factor_, "at least 1");
  }
  if (kind_ == Kind::kLlama3 &&
      Parameter("high_freq_factor", 0.0) <= Parameter("low_freq_factor", 0.0)) {
    return BadParameter(field, "high_freq_factor", Parameter("high_freq_factor", 0.0),
                        "above low_freq_factor");
  }
  if (kind_ == Kind::kDynamic || kind_ == Kind::kLongRope) {
    usual_length_ = static_cast<std::int64_t>(length_);
  }
  if (kind_ == Kind::kYarn) ATTN_RETURN_IF_ERROR(ReadYarn(field));
  return ReadLongRope(field, embedding);
}

absl::Status RotaryFrequencies::ReadYarn(const std::string& field) {
  // Zero is unset, as transformers has it.
  if (Parameter("beta_fast", 0.0) == 0.0) parameters_["beta_fast"] = 32.0;
  if (Parameter("beta_slow", 0.0) == 0.0) parameters_["beta_slow"] = 1.0;
  if (parameters_["beta_fast"] < parameters_["beta_slow"]) {
    return BadParameter(field, "beta_fast", parameters_["beta_fast"], "at least beta_slow");
  }
  const double mscale = Parameter("mscale", 0.0);
  const double mscale_all_dim = Parameter("mscale_all_dim", 0.0);
  const double inferred =
      mscale != 0.0 && mscale_all_dim != 0.0
          ? MagnitudeScale(factor_, mscale) / MagnitudeScale(factor_, mscale_all_dim)
          : MagnitudeScale(factor_, 1.0);
  attention_factor_ = static_cast<float>(Parameter("attention_factor", inferred));
  return absl::OkStatus();
}

absl::Status RotaryFrequencies::ReadLongRope(const std::string& field,
                                             const RotaryEmbedding& embedding) {
  if (kind_ != Kind::kLongRope) {
    for (const auto& [name, factors] : {std::pair("short_factor", &embedding.short_factor),
                                        std::pair("long_factor", &embedding.long_factor)}) {
      if (factors->empty()) continue;
      const std::string path = absl::StrCat(field, ".", name);
      return InvalidField(path, absl::StrCat(path, " has ", factors->size(),
                                             " entries, but only longrope takes any"));
    }
    return absl::OkStatus();
  }
  ATTN_ASSIGN_OR_RETURN(short_factor_,
                        Factors(absl::StrCat(field, ".short_factor"), embedding.short_factor));
  ATTN_ASSIGN_OR_RETURN(long_factor_,
                        Factors(absl::StrCat(field, ".long_factor"), embedding.long_factor));
  double inferred = 1.0;
  if (factor_ > 1.0) {
    if (length_ < 2.0 && !parameters_.contains("attention_factor")) {
      return BadParameter(field, kOriginalLength, length_, "at least 2");
    }
    inferred = std::sqrt(1.0 + std::log(factor_) / std::log(length_));
  }
  attention_factor_ = static_cast<float>(Parameter("attention_factor", inferred));
  return absl::OkStatus();
}

// transformers has a tensor for the length here, so that all of it is in float32.
double RotaryFrequencies::DynamicTheta(std::int64_t dim, std::int64_t length) const {
  if (static_cast<double>(length) <= length_) return theta_;
  const float stretched =
      static_cast<float>(factor_) * static_cast<float>(length) / static_cast<float>(length_);
  const float base = stretched - static_cast<float>(factor_ - 1.0);
  const double exponent = static_cast<double>(dim) / static_cast<double>(dim - 2);
  return static_cast<float>(theta_) * Power(base, static_cast<float>(exponent));
}

void RotaryFrequencies::Fill(std::int64_t dim, std::size_t first, std::int64_t length,
                             float* inverse) const {
  const auto pairs = static_cast<std::size_t>(dim / 2);
  const double theta = kind_ == Kind::kDynamic ? DynamicTheta(dim, length) : theta_;
  const std::vector<float>* factors = nullptr;
  if (kind_ == Kind::kLongRope) {
    factors = static_cast<double>(length) > length_ ? &long_factor_ : &short_factor_;
  }
  for (std::size_t i = 0; i < pairs; ++i) {
    const float wavelength = Wavelength(theta, dim, i);
    inverse[i] = 1.0f / (factors == nullptr ? wavelength : (*factors)[first + i] * wavelength);
    if (kind_ == Kind::kLinear) inverse[i] /= static_cast<float>(factor_);
  }
  if (kind_ == Kind::kYarn) ScaleYarn(dim, inverse);
  if (kind_ == Kind::kLlama3) ScaleLlama3(dim, inverse);
}

void RotaryFrequencies::ScaleYarn(std::int64_t dim, float* inverse) const {
  double low = CorrectionDim(parameters_.at("beta_fast"), dim, theta_, length_);
  double high = CorrectionDim(parameters_.at("beta_slow"), dim, theta_, length_);
  if (Parameter("truncate", 1.0) != 0.0) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(dim - 1));
  if (low == high) high += 0.001;
  for (std::size_t i = 0; i < static_cast<std::size_t>(dim / 2); ++i) {
    const float ramp =
        (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low);
    const float extrapolated = 1.0f - std::clamp(ramp, 0.0f, 1.0f);
    const float interpolation = 1.0f / (static_cast<float>(factor_) * Wavelength(theta_, dim, i));
    inverse[i] = interpolation * (1.0f - extrapolated) + inverse[i] * extrapolated;
  }
}

void RotaryFrequencies::ScaleLlama3(std::int64_t dim, float* inverse) const {
  const double low_factor = Parameter("low_freq_factor", 1.0);
  const double high_factor = Parameter("high_freq_factor", 1.0);
  const auto factor = static_cast<float>(factor_);
  const auto longest = static_cast<float>(length_ / low_factor);
  const auto shortest = static_cast<float>(length_ / high_factor);
  for (std::size_t i = 0; i < static_cast<std::size_t>(dim / 2); ++i) {
    // torch divides a number by a tensor as the tensor's reciprocal times the number.
    const float wavelength = 1.0f / inverse[i] * static_cast<float>(2.0 * std::numbers::pi);
    if (wavelength > longest) {
      inverse[i] /= factor;
    } else if (!(wavelength < shortest)) {
      const float turns = 1.0f / wavelength * static_cast<float>(length_);
      const float smooth =
          (turns - static_cast<float>(low_factor)) / static_cast<float>(high_factor - low_factor);
      inverse[i] = (1.0f - smooth) * inverse[i] / factor + smooth * inverse[i];
    }
  }
}

}  // namespace attn
