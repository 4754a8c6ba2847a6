#include "tests/reference/attention_reference.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace attn::reference {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::KeyValueSpan;
using kernels::Mask;
using kernels::MaskType;
using kernels::RowsView;
using kernels::ScoreStage;
using kernels::Sequence;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A binary format by its parameters: the sign, `exponent_bits`, then `fraction_bits`.
struct Format {
  int exponent_bits;
  int fraction_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int largest_exponent_field() const { return (1 << exponent_bits) - 1; }
};

Format FormatOf(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return {8, 23};
    case ElementType::kFloat16:
      return {5, 10};
    case ElementType::kBFloat16:
      return {8, 7};
    case ElementType::kInt8:  // of pages alone: no tensor has it
      break;
  }
  std::abort();
}

double Decode(const Format& format, uint32_t bits) {
  const int fraction = static_cast<int>(bits & ((1u << format.fraction_bits) - 1));
  const int exponent =
      static_cast<int>(bits >> format.fraction_bits) & format.largest_exponent_field();
  const bool negative = (bits >> (format.fraction_bits + format.exponent_bits) & 1u) != 0;
  double magnitude;
  if (exponent == format.largest_exponent_field()) {
    magnitude = fraction == 0 ? kInfinity : kNaN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, 1 - format.bias() - format.fraction_bits);
  } else {
    magnitude = std::ldexp((1 << format.fraction_bits) + fraction,
                           exponent - format.bias() - format.fraction_bits);
  }
  return negative ? -magnitude : magnitude;
}

uint32_t Encode(const Format& format, double value) {
  const uint32_t sign =
      std::signbit(value) ? 1u << (format.fraction_bits + format.exponent_bits) : 0u;
  const auto special = static_cast<uint32_t>(format.largest_exponent_field())
                       << format.fraction_bits;
  if (std::isnan(value)) return special | 1u << (format.fraction_bits - 1);
  if (std::isinf(value)) return sign | special;
  const double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // in [2^(exponent-1), 2^exponent)
  const int lowest = 1 - format.bias();
  const int field = std::max(exponent - 1, lowest);
  // The number of units in the last place; 2^fraction_bits too many carries into the exponent by
  // itself.
  const double units = std::nearbyint(std::ldexp(magnitude, format.fraction_bits - field));
  const auto bits = static_cast<uint64_t>(units) +
                    (static_cast<uint64_t>(field - lowest) << format.fraction_bits);
  return sign | (bits >= special ? special : static_cast<uint32_t>(bits));
}

double ReadMask(const Mask& mask, int64_t index) {
  switch (mask.type) {
    case MaskType::kNone:
      return 0;
    case MaskType::kBool:
      return static_cast<const uint8_t*>(mask.data)[index] != 0 ? 0 : -kInfinity;
    case MaskType::kFloat32:
      return ReadElement(ElementType::kFloat32, mask.data, index);
    case MaskType::kFloat16:
      return ReadElement(ElementType::kFloat16, mask.data, index);
    case MaskType::kBFloat16:
      return ReadElement(ElementType::kBFloat16, mask.data, index);
  }
  std::abort();
}

double MaskAt(const AttentionArgs& args, const Sequence& sequence, int64_t head, int64_t row,
              int64_t key) {
  const Mask& mask = args.mask;
  return ReadMask(mask, sequence.mask_row * mask.batch_stride + head * mask.head_stride +
                            row * mask.query_stride + key * mask.key_stride);
}

bool InReach(const AttentionArgs& args, const Sequence& sequence, int64_t row, int64_t key) {
  // In double: a window may be as wide as int64_t allows.
  const auto behind = static_cast<double>(sequence.first_query_position + row - key);
  if (args.is_causal && behind < 0) return false;
  if (args.window_left >= 0 && behind > static_cast<double>(args.window_left)) return false;
  if (args.window_right >= 0 && -behind > static_cast<double>(args.window_right)) return false;
  return args.mask.type == MaskType::kNone || key < args.mask.kv_extent;
}

double ReadRow(ElementType type, const RowsView& rows, int64_t row, int64_t head, int64_t i) {
  return ReadElement(type, rows.data, row * rows.row_stride + head * rows.head_stride + i);
}

// One head's keys and values, gathered from the spans.
struct HeadKeys {
  std::vector<std::vector<double>> keys;
  std::vector<std::vector<double>> values;
};

HeadKeys GatherKeys(const AttentionArgs& args, const Sequence& sequence, int64_t kv_head) {
  HeadKeys gathered;
  for (int64_t s = 0; s < sequence.num_spans; ++s) {
    const KeyValueSpan& span = sequence.spans[s];
    for (int64_t row = 0; row < span.length; ++row) {
      std::vector<double>& key = gathered.keys.emplace_back();
      for (int64_t i = 0; i < args.head_dim; ++i) {
        key.push_back(ReadRow(args.kv_dtype, span.key, row, kv_head, i));
      }
      std::vector<double>& value = gathered.values.emplace_back();
      for (int64_t i = 0; i < args.value_dim; ++i) {
        value.push_back(ReadRow(args.kv_dtype, span.value, row, kv_head, i));
      }
    }
  }
  return gathered;
}

void Raise(double* largest, double value) {
  if (std::isfinite(value)) *largest = std::max(*largest, value);
}

// Scores of one query against all keys, masked; writes what `stage` shows into `shown`.
std::vector<double> ScoreRow(const AttentionArgs& args, const Sequence& sequence, int64_t head,
                             int64_t row, const HeadKeys& head_keys, double* shown,
                             ReferenceResult* result) {
  std::vector<double> scores;
  for (int64_t j = 0; j < sequence.kv_len; ++j) {
    const bool sees = Sees(args, sequence, head, row, j);
    const auto& key = head_keys.keys[static_cast<std::size_t>(j)];
    double dot = 0;
    double magnitude = 0;
    for (int64_t i = 0; i < args.head_dim; ++i) {
      const double product =
          ReadRow(args.dtype, sequence.query, row, head, i) * key[static_cast<std::size_t>(i)];
      dot += product;
      magnitude += std::fabs(product);
    }
    const double scale = args.scale;
    double score = scale * dot;
    if (args.stage == ScoreStage::kScaled) shown[j] = score;
    if (args.soft_cap > 0) score = args.soft_cap * std::tanh(score / args.soft_cap);
    if (args.stage == ScoreStage::kSoftCapped) shown[j] = score;
    // Stages before the mask show hidden keys too: their errors count.
    Raise(&result->product_magnitude, std::fabs(scale) * magnitude);
    if (sees) {
      double bias = 0;
      if (args.alibi_slopes != nullptr) {
        const auto distance = std::abs(sequence.first_query_position + row - j);
        bias = -static_cast<double>(args.alibi_slopes[head]) * static_cast<double>(distance);
      }
      const double mask = MaskAt(args, sequence, head, row, j);
      Raise(&result->bias_magnitude, std::fabs(bias) + std::fabs(mask));
      score += bias + mask;
    } else {
      score = -kInfinity;
    }
    if (args.stage == ScoreStage::kMasked) shown[j] = score;
    scores.push_back(score);
  }
  return scores;
}

// Scores become probabilities; returns the LSE.
double Softmax(double sink, std::vector<double>* scores) {
  double largest = sink;
  bool any_nan = false;
  for (const double score : *scores) {
    any_nan = any_nan || std::isnan(score);
    largest = std::max(largest, score);
  }
  if (any_nan || largest == kInfinity) {
    std::fill(scores->begin(), scores->end(), kNaN);
    return kNaN;
  }
  if (largest == -kInfinity) {
    std::fill(scores->begin(), scores->end(), 0.0);
    return -kInfinity;
  }
  double sum = std::exp(sink - largest);
  for (const double score : *scores) sum += std::exp(score - largest);
  for (double& score : *scores) score = std::exp(score - largest) / sum;
  return largest + std::log(sum);
}

void ReferenceHead(const AttentionArgs& args, const Sequence& sequence, int64_t head,
                   ReferenceResult* result) {
  const HeadKeys head_keys =
      GatherKeys(args, sequence, head / (args.num_heads / args.num_kv_heads));
  const double sink = args.sink_logits != nullptr ? args.sink_logits[head] : -kInfinity;
  std::vector<double> unshown(static_cast<std::size_t>(sequence.kv_len));
  for (int64_t row = 0; row < sequence.q_len; ++row) {
    double* const shown =
        args.stage == ScoreStage::kNone
            ? unshown.data()
            : result->weights.data() + (head * sequence.q_len + row) * sequence.kv_len;
    std::vector<double> weights = ScoreRow(args, sequence, head, row, head_keys, shown, result);
    const auto at = static_cast<std::size_t>(row * args.num_heads + head);
    result->lse[at] = Softmax(sink, &weights);
    if (args.stage == ScoreStage::kProbabilities) {
      std::copy(weights.begin(), weights.end(), shown);
    }
    double* const output = result->output.data() + at * static_cast<std::size_t>(args.value_dim);
    for (std::size_t j = 0; j < weights.size(); ++j) {
      if (weights[j] == 0) continue;  // hidden: 0 * NaN would be NaN
      for (std::size_t i = 0; i < head_keys.values[j].size(); ++i) {
        Raise(&result->value_magnitude, std::fabs(head_keys.values[j][i]));
        output[i] += weights[j] * head_keys.values[j][i];
      }
    }
  }
}

}  // namespace

int64_t ElementBytes(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

double ReadElement(ElementType type, const void* data, int64_t index) {
  const auto bytes = static_cast<std::size_t>(ElementBytes(type));
  uint32_t bits = 0;  // little-endian
  std::memcpy(&bits, static_cast<const char*>(data) + index * ElementBytes(type), bytes);
  return Decode(FormatOf(type), bits);
}

void WriteElement(double value, ElementType type, void* data, int64_t index) {
  const auto bytes = static_cast<std::size_t>(ElementBytes(type));
  const uint32_t bits = Encode(FormatOf(type), value);
  std::memcpy(static_cast<char*>(data) + index * ElementBytes(type), &bits, bytes);
}

bool Sees(const AttentionArgs& args, const Sequence& sequence, int64_t head, int64_t row,
          int64_t key) {
  return InReach(args, sequence, row, key) && MaskAt(args, sequence, head, row, key) != -kInfinity;
}

std::vector<ReferenceResult> AttentionReference(const AttentionArgs& args) {
  std::vector<ReferenceResult> results;
  for (int64_t b = 0; b < args.num_sequences; ++b) {
    const Sequence& sequence = args.sequences[b];
    ReferenceResult& result = results.emplace_back();
    const auto rows = static_cast<std::size_t>(sequence.q_len * args.num_heads);
    result.output.resize(rows * static_cast<std::size_t>(args.value_dim));
    result.lse.resize(rows);
    if (args.stage != ScoreStage::kNone) {
      result.weights.resize(rows * static_cast<std::size_t>(sequence.kv_len));
    }
    for (int64_t head = 0; head < args.num_heads; ++head) {
      ReferenceHead(args, sequence, head, &result);
    }
  }
  return results;
}

}  // namespace attn::reference
