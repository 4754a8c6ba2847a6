// Rotary position embedding of one layer (arXiv:2104.09864), with the scalings of Hugging Face's
// rope_parameters. Plain loops without LibTorch, so that cached keys are rotated where they are
// appended.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/dtype.h"
#include "core/model_spec.h"
#include "core/rotary_frequencies.h"

namespace attn {

// Immutable: every method may be called from several threads.
class Rotary {
 public:
  // INVALID_ARGUMENT naming field + ".theta" and the like for values that make no sense;
  // UNIMPLEMENTED (reason UNSUPPORTED_MODEL) for an unknown scaling. The lengths that
  // scaling_parameters leave out are taken from `original_or_max_positions` (0: unknown).
  static absl::StatusOr<std::shared_ptr<const Rotary>> Create(
      const std::string& field, const RotaryEmbedding& embedding, std::int64_t head_dim,
      std::int64_t original_or_max_positions);

  // Axes of position_ids that differ.
  int axes() const { return static_cast<int>(sections_.size()); }
  // Cosines and sines per token: half the rotated dimensions.
  std::int64_t pairs() const { return pairs_; }
  // Two-dimensional: a token's place in its row says nothing about its position.
  bool needs_positions() const { return frequencies_per_axis_ && sections_.size() > 1; }

  // The angles of one batch row: axis a of token i stands at positions[a * axis_stride + i]
  // (axis_stride 0: one axis serves all). cos and sin are [count][pairs()], both multiplied by the
  // attention factor (yarn, longrope). `largest` is the row's largest position in this call, by
  // which dynamic and longrope choose frequencies.
  void Angles(const std::int64_t* positions, std::int64_t axis_stride, std::int64_t count,
              std::int64_t largest, float* cos, float* sin) const;

  // Rotates one head's vector of head_dim elements in place, by one token's cosines and sines.
  // Arithmetic is in float32; dimensions beyond the rotated ones stay. `dtype` is floating; float32
  // vectors are aligned to 4 bytes.
  void Rotate(void* vector, DType dtype, const float* cos, const float* sin) const;

 private:
  Rotary(const RotaryEmbedding& embedding, std::int64_t pairs, RotaryFrequencies frequencies);

  void FillFrequencies(std::int64_t length, float* inverse) const;

  const RotaryFrequencies frequencies_;
  const std::int64_t pairs_;
  const bool interleaved_;
  const bool frequencies_per_axis_;
  std::vector<std::int64_t> sections_;  // pairs of each axis
  std::vector<float> usual_;            // [pairs_]: frequencies of rows up to the usual length
  std::vector<float> long_;             // [pairs_]: of longer ones, where they do not depend on it
};

}  // namespace attn
