#include "core/rotary.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/dtype_conversion.h"
#include "core/error.h"

namespace attn {
namespace {

// Pairs of a narrower dtype that are widened at a time.
constexpr std::size_t kBlock = 64;
// A row's length is one more than its largest position.
constexpr std::int64_t kLastPosition = std::numeric_limits<std::int64_t>::max() - 1;

absl::Status CheckSections(const std::string& field, const RotaryEmbedding& embedding,
                           std::int64_t pairs) {
  std::uint64_t sum = 0;
  const std::string path = absl::StrCat(field, ".axis_sections");
  for (std::uint32_t section : embedding.axis_sections) {
    if (section == 0) return InvalidField(path, absl::StrCat(path, " has an entry of 0"));
    sum += section;
  }
  if (embedding.axis_sections.empty() || sum == static_cast<std::uint64_t>(pairs)) {
    return absl::OkStatus();
  }
  return InvalidField(
      path, absl::StrCat(path, " sum to ", sum, ", but there are ", pairs, " frequencies"));
}

absl::StatusOr<std::int64_t> CountPairs(const std::string& field, const RotaryEmbedding& embedding,
                                        std::int64_t head_dim) {
  const std::int64_t rotary_dim = embedding.rotary_dim == 0 ? head_dim : embedding.rotary_dim;
  if (rotary_dim < 2 || rotary_dim > head_dim || rotary_dim % 2 != 0) {
    const std::string path = absl::StrCat(field, ".rotary_dim");
    return InvalidField(path, absl::StrCat(path, " is ", rotary_dim,
                                           ", but must be even and at most head_dim, ", head_dim));
  }
  return rotary_dim / 2;
}

absl::Status CheckFactors(const std::string& field, const RotaryEmbedding& embedding,
                          std::int64_t pairs) {
  if (embedding.scaling != "longrope") return absl::OkStatus();
  for (const auto& [name, size] : {std::pair("short_factor", embedding.short_factor.size()),
                                   std::pair("long_factor", embedding.long_factor.size())}) {
    if (static_cast<std::int64_t>(size) == pairs) continue;
    const std::string path = absl::StrCat(field, ".", name);
    return InvalidField(
        path, absl::StrCat(path, " has ", size, " entries, but there are ", pairs, " frequencies"));
  }
  return absl::OkStatus();
}

// `first` and `second` are the two coordinates of each pair.
void RotatePairs(float* __restrict first, float* __restrict second, const float* __restrict cos,
                 const float* __restrict sin, std::size_t pairs) {
  for (std::size_t i = 0; i < pairs; ++i) {
    const float x = first[i];
    const float y = second[i];
    first[i] = x * cos[i] - y * sin[i];
    second[i] = y * cos[i] + x * sin[i];
  }
}

void RotateInterleaved(float* __restrict vector, const float* __restrict cos,
                       const float* __restrict sin, std::size_t pairs) {
  for (std::size_t i = 0; i < pairs; ++i) {
    const float x = vector[2 * i];
    const float y = vector[2 * i + 1];
    vector[2 * i] = x * cos[i] - y * sin[i];
    vector[2 * i + 1] = y * cos[i] + x * sin[i];
  }
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Rotary>> Rotary::Create(
    const std::string& field, const RotaryEmbedding& embedding, std::int64_t head_dim,
    std::int64_t original_or_max_positions) {
  ATTN_ASSIGN_OR_RETURN(const std::int64_t pairs, CountPairs(field, embedding, head_dim));
  ATTN_RETURN_IF_ERROR(CheckSections(field, embedding, pairs));
  ATTN_RETURN_IF_ERROR(CheckFactors(field, embedding, pairs));
  ATTN_ASSIGN_OR_RETURN(RotaryFrequencies frequencies,
                        RotaryFrequencies::Create(field, embedding, original_or_max_positions));
  return std::shared_ptr<const Rotary>(new Rotary(embedding, pairs, std::move(frequencies)));
}

Rotary::Rotary(const RotaryEmbedding& embedding, std::int64_t pairs, RotaryFrequencies frequencies)
    : frequencies_(std::move(frequencies)),
      pairs_(pairs),
      interleaved_(embedding.interleaved),
      frequencies_per_axis_(embedding.frequencies_per_axis),
      sections_(embedding.axis_sections.begin(), embedding.axis_sections.end()) {
  if (sections_.empty()) sections_ = {pairs_};
  usual_.resize(static_cast<std::size_t>(pairs_));
  FillFrequencies(0, usual_.data());
  if (frequencies_.usual_length() > 0 && !frequencies_.depends_on_length()) {
    long_.resize(usual_.size());
    FillFrequencies(frequencies_.usual_length() + 1, long_.data());
  }
}

void Rotary::FillFrequencies(std::int64_t length, float* inverse) const {
  if (!frequencies_per_axis_) {
    frequencies_.Fill(2 * pairs_, 0, length, inverse);
    return;
  }
  std::size_t first = 0;
  for (std::int64_t section : sections_) {
    frequencies_.Fill(2 * section, first, length, inverse + first);
    first += static_cast<std::size_t>(section);
  }
}

void Rotary::Angles(const std::int64_t* positions, std::int64_t axis_stride, std::int64_t count,
                    std::int64_t largest, float* cos, float* sin) const {
  if (count == 0) return;
  const float* inverse = usual_.data();
  if (frequencies_.usual_length() > 0 && largest >= frequencies_.usual_length()) {
    if (frequencies_.depends_on_length()) {
      // They are kept where the last token's sines will be: each is read before its sine is
      // written, and nothing is allocated.
      float* const own = sin + (count - 1) * pairs_;
      FillFrequencies(std::min(largest, kLastPosition) + 1, own);
      inverse = own;
    } else {
      inverse = long_.data();
    }
  }
  const float scale = frequencies_.attention_factor();
  for (std::int64_t token = 0; token < count; ++token) {
    std::int64_t pair = 0;
    for (std::size_t axis = 0; axis < sections_.size(); ++axis) {
      const std::int64_t place = static_cast<std::int64_t>(axis) * axis_stride + token;
      const auto position = static_cast<float>(positions[place]);
      for (const std::int64_t end = pair + sections_[axis]; pair < end; ++pair) {
        const float angle = position * inverse[pair];
        cos[token * pairs_ + pair] = std::cos(angle) * scale;
        sin[token * pairs_ + pair] = std::sin(angle) * scale;
      }
    }
  }
}

void Rotary::Rotate(void* vector, DType dtype, const float* cos, const float* sin) const {
  const auto pairs = static_cast<std::size_t>(pairs_);
  if (dtype == DType::kFloat32) {
    auto* const values = static_cast<float*>(vector);
    if (interleaved_) return RotateInterleaved(values, cos, sin, pairs);
    return RotatePairs(values, values + pairs, cos, sin, pairs);
  }
  auto* const bytes = static_cast<unsigned char*>(vector);
  const std::size_t item = ItemSize(dtype);
  std::array<float, 2 * kBlock> wide;
  for (std::size_t begin = 0; begin < pairs; begin += kBlock) {
    const std::size_t count = std::min(kBlock, pairs - begin);
    // Interleaved pairs are one range, halves are two.
    unsigned char* const first = bytes + (interleaved_ ? 2 * begin : begin) * item;
    unsigned char* const second =
        interleaved_ ? first + count * item : bytes + (pairs + begin) * item;
    ConvertElements(first, dtype, wide.data(), DType::kFloat32, count);
    ConvertElements(second, dtype, wide.data() + count, DType::kFloat32, count);
    if (interleaved_) {
      RotateInterleaved(wide.data(), cos + begin, sin + begin, count);
    } else {
      RotatePairs(wide.data(), wide.data() + count, cos + begin, sin + begin, count);
    }
    ConvertElements(wide.data(), DType::kFloat32, first, dtype, count);
    ConvertElements(wide.data() + count, DType::kFloat32, second, dtype, count);
  }
}

}  // namespace attn
