// The frequencies of rotary position embedding under the scalings of Hugging Face's
// rope_parameters. Apart from rotary.h because it follows transformers' modeling_rope_utils
// operation by operation: the same float32 roundings in the same order, since an angle at position
// 100,000 magnifies the last bit of its frequency to 1e-3.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/model_spec.h"

namespace attn {

// The scalings and the names that each reads from scaling_parameters:
//   ""        none
//   linear    factor
//   dynamic   factor, max_position_embeddings
//   yarn      factor, original_max_position_embeddings; optional: attention_factor, beta_fast (32),
//             beta_slow (1), mscale, mscale_all_dim, truncate (1)
//   llama3    factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
//   longrope  factor, original_max_position_embeddings; optional: attention_factor
// Null for a scaling that is not known.
struct RotaryScalingNames {
  const char* scaling;
  std::span<const char* const> required;
  std::span<const char* const> optional;
};
const RotaryScalingNames* FindRotaryScaling(const std::string& scaling);
// Whether any scaling reads the name.
bool IsRotaryParameter(const std::string& name);

class RotaryFrequencies {
 public:
  // INVALID_ARGUMENT naming field + ".scaling_parameters.factor" and the like for a name that is
  // missing, unknown or out of range; UNIMPLEMENTED (reason UNSUPPORTED_MODEL) for an unknown
  // scaling. `positions` stands in for the lengths that parameters leave out; 0: unknown.
  static absl::StatusOr<RotaryFrequencies> Create(const std::string& field,
                                                  const RotaryEmbedding& embedding,
                                                  std::int64_t positions);

  // What cosines and sines are multiplied by.
  float attention_factor() const { return attention_factor_; }

  // A row of more positions than this has frequencies of its own; 0: never.
  std::int64_t usual_length() const { return usual_length_; }
  // Whether frequencies beyond usual_length() depend on the length itself.
  bool depends_on_length() const { return kind_ == Kind::kDynamic; }

  // The `dim / 2` frequencies of a series over `dim` dimensions, for a row of `length` positions.
  // `first`: where the series begins in short_factor and long_factor.
  void Fill(std::int64_t dim, std::size_t first, std::int64_t length, float* inverse) const;

 private:
  enum class Kind : std::uint8_t { kNone, kLinear, kDynamic, kYarn, kLlama3, kLongRope };

  absl::Status Read(const std::string& field, const RotaryEmbedding& embedding,
                    std::int64_t positions);
  absl::Status ReadYarn(const std::string& field);
  absl::Status ReadLongRope(const std::string& field, const RotaryEmbedding& embedding);
  double Parameter(const std::string& name, double fallback) const;

  double DynamicTheta(std::int64_t dim, std::int64_t length) const;
  void ScaleYarn(std::int64_t dim, float* inverse) const;
  void ScaleLlama3(std::int64_t dim, float* inverse) const;

  Kind kind_ = Kind::kNone;
  double theta_ = 0.0;
  std::map<std::string, double> parameters_;
  double factor_ = 1.0;
  double length_ = 0.0;  // original_max_position_embeddings, or max_position_embeddings
  float attention_factor_ = 1.0f;
  std::int64_t usual_length_ = 0;
  std::vector<float> short_factor_;
  std::vector<float> long_factor_;
};

}  // namespace attn
