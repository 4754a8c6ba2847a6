#include "tests/reference/problem_builder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "tests/reference/attention_reference.h"

namespace attn::reference {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::KeyValueSpan;
using kernels::Mask;
using kernels::MaskType;
using kernels::ScoreStage;
using kernels::Sequence;

constexpr int64_t kPadding = 3;  // elements of NaN between rows
constexpr std::size_t kAlignment = 64;
constexpr uint8_t kPoison = 0xff;  // 0xffff... is NaN in every element type
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Poisoned memory for `elements` with poison on both sides.
class Buffer {
 public:
  Buffer() = default;
  Buffer(int64_t elements, int64_t element_bytes, bool misaligned)
      : bytes_(static_cast<std::size_t>(elements * element_bytes) + 4 * kAlignment, kPoison) {
    const auto address = reinterpret_cast<std::uintptr_t>(bytes_.data());
    begin_ = 2 * kAlignment - address % kAlignment +
             (misaligned ? static_cast<std::size_t>(element_bytes) : 0);
  }
  char* data() { return reinterpret_cast<char*>(bytes_.data()) + begin_; }

  void Expect(const void* element, int64_t element_bytes) {
    if (expected_.empty()) expected_.resize(bytes_.size());
    const auto at = static_cast<const uint8_t*>(element) - bytes_.data();
    std::fill_n(expected_.begin() + at, element_bytes, true);
  }
  bool NothingElseWritten() const {
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      if ((expected_.empty() || !expected_[i]) && bytes_[i] != kPoison) return false;
    }
    return true;
  }

 private:
  std::vector<uint8_t> bytes_;
  std::vector<bool> expected_;
  std::size_t begin_ = 0;
};

// Rows of heads of all sequences in one buffer.
struct RowsStorage {
  Buffer buffer;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  std::vector<int64_t> begin;  // of each sequence, in elements
};

RowsStorage MakeRows(const ProblemCase& c, const std::vector<int64_t>& lengths, int64_t heads,
                     int64_t dim, ElementType type) {
  RowsStorage rows;
  const int64_t padded = dim + kPadding;
  int64_t longest = 0;
  int64_t total = 0;
  for (const int64_t length : lengths) {
    longest = std::max(longest, length);
    rows.begin.push_back(total * heads * padded);
    total += length;
  }
  if (c.layout == Layout::kHeadsFirst) {
    rows.row_stride = padded;
    rows.head_stride = longest * padded + kPadding;
  } else {
    rows.row_stride = heads * padded;
    rows.head_stride = padded;
  }
  int64_t elements = total * heads * padded;
  if (c.layout != Layout::kPacked) {
    const int64_t sequence = heads * (longest * padded + kPadding);
    for (std::size_t b = 0; b < lengths.size(); ++b) {
      rows.begin[b] = static_cast<int64_t>(b) * sequence;
    }
    elements = static_cast<int64_t>(lengths.size()) * sequence;
  }
  rows.buffer = Buffer(elements, ElementBytes(type), c.misaligned);
  return rows;
}

int64_t MaskElementBytes(MaskType type) {
  return type == MaskType::kBool ? 1 : type == MaskType::kFloat32 ? 4 : 2;
}

void WriteMask(double value, MaskType type, char* data, int64_t index) {
  switch (type) {
    case MaskType::kNone:
      return;
    case MaskType::kBool:
      data[index] = value == -kInfinity ? 0 : 1;
      return;
    case MaskType::kFloat32:
      return WriteElement(value, ElementType::kFloat32, data, index);
    case MaskType::kFloat16:
      return WriteElement(value, ElementType::kFloat16, data, index);
    case MaskType::kBFloat16:
      return WriteElement(value, ElementType::kBFloat16, data, index);
  }
}

}  // namespace

struct AttentionProblem::Storage {
  ProblemCase c;
  std::mt19937 random;
  AttentionArgs args;
  std::vector<Sequence> sequences;
  std::vector<std::vector<KeyValueSpan>> spans;  // of each sequence
  std::vector<float> slopes;
  std::vector<float> sinks;
  RowsStorage query;
  RowsStorage output;
  std::vector<RowsStorage> keys;  // of each span's index
  std::vector<RowsStorage> values;
  Buffer mask;
  Buffer lse;
  Buffer weights;

  double Normal() { return std::normal_distribution<double>()(random); }
  int64_t UpTo(int64_t largest) {
    return std::uniform_int_distribution<int64_t>(0, largest)(random);
  }

  void ChooseLengths();
  void MakeInputs();
  void MakeMask();
  void MakeResults();
  void PlaceSpecials();
  void Fill(RowsStorage* rows, std::size_t b, int64_t length, int64_t heads, int64_t dim);
  void Overwrite(int64_t b, int64_t kv_head, int64_t key, double key_value, double value);
};

void AttentionProblem::Storage::ChooseLengths() {
  for (int64_t b = 0; b < c.batch; ++b) {
    Sequence sequence;
    const bool whole = !c.ragged || b == 0;
    sequence.q_len = whole ? c.q_len : UpTo(c.q_len);
    sequence.kv_len = whole ? c.kv_len : UpTo(c.kv_len);
    sequence.first_query_position =
        c.first_query_position.value_or(sequence.kv_len - sequence.q_len);
    sequence.mask_row = c.batch - 1 - b;  // not b: a kernel must use the field
    std::vector<KeyValueSpan>& list = spans.emplace_back();
    int64_t left = sequence.kv_len;
    for (int64_t s = 0; s < c.spans; ++s) {
      KeyValueSpan span;
      span.length = s == c.spans - 1 ? left : UpTo(left);
      left -= span.length;
      list.push_back(span);
    }
    sequences.push_back(sequence);
  }
}

void AttentionProblem::Storage::Fill(RowsStorage* rows, std::size_t b, int64_t length,
                                     int64_t heads, int64_t dim) {
  for (int64_t row = 0; row < length; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t at = rows->begin[b] + row * rows->row_stride + head * rows->head_stride;
      for (int64_t i = 0; i < dim; ++i) {
        WriteElement(Normal(), c.dtype, rows->buffer.data(), at + i);
      }
    }
  }
}

void AttentionProblem::Storage::MakeInputs() {
  const int64_t bytes = ElementBytes(c.dtype);
  std::vector<int64_t> lengths;
  for (const Sequence& sequence : sequences) lengths.push_back(sequence.q_len);
  query = MakeRows(c, lengths, c.heads, c.head_dim, c.dtype);
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    Fill(&query, b, lengths[b], c.heads, c.head_dim);
    sequences[b].query = {query.buffer.data() + query.begin[b] * bytes, query.row_stride,
                          query.head_stride};
  }
  for (std::size_t s = 0; s < static_cast<std::size_t>(c.spans); ++s) {
    for (std::size_t b = 0; b < sequences.size(); ++b) lengths[b] = spans[b][s].length;
    RowsStorage& key = keys.emplace_back(MakeRows(c, lengths, c.kv_heads, c.head_dim, c.dtype));
    RowsStorage& value =
        values.emplace_back(MakeRows(c, lengths, c.kv_heads, c.value_dim, c.dtype));
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      Fill(&key, b, lengths[b], c.kv_heads, c.head_dim);
      Fill(&value, b, lengths[b], c.kv_heads, c.value_dim);
      spans[b][s].key = {key.buffer.data() + key.begin[b] * bytes, key.row_stride, key.head_stride};
      spans[b][s].value = {value.buffer.data() + value.begin[b] * bytes, value.row_stride,
                           value.head_stride};
    }
  }
  for (int64_t head = 0; head < c.heads; ++head) {
    slopes.push_back(static_cast<float>(std::exp2(-1.0 - static_cast<double>(head))));
    sinks.push_back(static_cast<float>(Normal() * c.logit_magnitude));
  }
}

void AttentionProblem::Storage::MakeMask() {
  if (c.mask == MaskType::kNone) return;
  Mask& m = args.mask;
  m.type = c.mask;
  m.kv_extent = c.mask_extent >= 0 ? std::min(c.mask_extent, c.kv_len) : c.kv_len;
  m.key_stride = c.mask_broadcasts_keys ? 0 : 1;
  const int64_t row = (c.mask_broadcasts_keys ? 1 : m.kv_extent) + kPadding;
  const int64_t rows = c.mask_rank >= 2 ? c.q_len : 1;
  const int64_t heads = c.mask_rank >= 3 ? c.heads : 1;
  const int64_t batches = c.mask_rank >= 4 ? c.batch : 1;
  m.query_stride = c.mask_rank >= 2 ? row : 0;
  m.head_stride = c.mask_rank >= 3 ? rows * row : 0;
  m.batch_stride = c.mask_rank >= 4 ? heads * rows * row : 0;
  mask = Buffer(batches * heads * rows * row, MaskElementBytes(c.mask), c.misaligned);
  m.data = mask.data();
  for (int64_t r = 0; r < batches * heads * rows; ++r) {
    const bool hides_all = c.mask_rank >= 2 && r % rows % 5 == 3;
    for (int64_t j = 0; j < row - kPadding; ++j) {
      const bool hidden = hides_all || UpTo(3) == 0;
      WriteMask(hidden ? -kInfinity : Normal(), c.mask, mask.data(), r * row + j);
    }
  }
}

void AttentionProblem::Storage::MakeResults() {
  const int64_t bytes = ElementBytes(c.output_dtype);
  std::vector<int64_t> lengths;
  int64_t rows = 0;
  int64_t weight_elements = 0;
  for (const Sequence& sequence : sequences) {
    lengths.push_back(sequence.q_len);
    rows += sequence.q_len;
    weight_elements += c.heads * sequence.q_len * (sequence.kv_len + kPadding);
  }
  output = MakeRows(c, lengths, c.heads, c.value_dim, c.output_dtype);
  lse = Buffer(rows * (c.heads + kPadding), 4, c.misaligned);
  weights = Buffer(weight_elements, bytes, c.misaligned);
  char* next_lse = lse.data();
  char* next_weights = weights.data();
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    Sequence& sequence = sequences[b];
    sequence.output = {output.buffer.data() + output.begin[b] * bytes, output.row_stride,
                       output.head_stride};
    if (c.lse) {
      sequence.lse = reinterpret_cast<float*>(next_lse);
      sequence.lse_row_stride = c.heads + kPadding;
      sequence.lse_head_stride = 1;
      next_lse += sequence.q_len * sequence.lse_row_stride * 4;
    }
    if (c.stage != ScoreStage::kNone) {
      sequence.weights = next_weights;
      sequence.weights_row_stride = sequence.kv_len + kPadding;
      sequence.weights_head_stride = sequence.q_len * sequence.weights_row_stride;
      next_weights += c.heads * sequence.weights_head_stride * bytes;
    }
    for (int64_t row = 0; row < sequence.q_len; ++row) {
      for (int64_t head = 0; head < c.heads; ++head) {
        output.buffer.Expect(static_cast<char*>(sequence.output.data) +
                                 (row * output.row_stride + head * output.head_stride) * bytes,
                             c.value_dim * bytes);
        if (c.lse) lse.Expect(sequence.lse + row * sequence.lse_row_stride + head, 4);
        if (sequence.weights == nullptr) continue;
        weights.Expect(
            static_cast<char*>(sequence.weights) +
                (head * sequence.weights_head_stride + row * sequence.weights_row_stride) * bytes,
            sequence.kv_len * bytes);
      }
    }
  }
}

void AttentionProblem::Storage::Overwrite(int64_t b, int64_t kv_head, int64_t key, double key_value,
                                          double value) {
  for (const KeyValueSpan& span : spans[static_cast<std::size_t>(b)]) {
    if (key >= span.length) {
      key -= span.length;
      continue;
    }
    const auto write = [&](const kernels::RowsView& rows, int64_t dim, double number) {
      const int64_t at = key * rows.row_stride + kv_head * rows.head_stride;
      for (int64_t i = 0; i < dim; ++i) {
        WriteElement(number, c.dtype, const_cast<void*>(rows.data), at + i);
      }
    };
    if (key_value != 0) write(span.key, c.head_dim, key_value);
    write(span.value, c.value_dim, value);
    return;
  }
}

void AttentionProblem::Storage::PlaceSpecials() {
  const int64_t group = c.heads / c.kv_heads;
  for (int64_t b = 0; b < c.batch; ++b) {
    const Sequence& sequence = sequences[static_cast<std::size_t>(b)];
    for (int64_t kv_head = 0; kv_head < c.kv_heads; ++kv_head) {
      if (c.infinite_value >= 0) Overwrite(b, kv_head, c.infinite_value, 0, kInfinity);
      if (c.nan_key >= 0) Overwrite(b, kv_head, c.nan_key, kNaN, kNaN);
      for (int64_t key = 0; c.hidden_keys_nan && key < sequence.kv_len; ++key) {
        bool seen = false;
        for (int64_t at = 0; at < group * sequence.q_len && !seen; ++at) {
          seen = Sees(args, sequence, kv_head * group + at % group, at / group, key);
        }
        if (!seen) Overwrite(b, kv_head, key, kNaN, kNaN);
      }
    }
  }
}

AttentionProblem::AttentionProblem(const ProblemCase& c) : storage_(new Storage) {
  Storage& s = *storage_;
  s.c = c;
  if (s.c.value_dim == 0) s.c.value_dim = c.head_dim;
  s.random.seed(c.seed);
  s.ChooseLengths();
  s.MakeInputs();
  s.MakeMask();
  s.MakeResults();
  AttentionArgs& args = s.args;
  args.dtype = args.kv_dtype = c.dtype;
  args.output_dtype = c.output_dtype;
  args.num_heads = c.heads;
  args.num_kv_heads = c.kv_heads;
  args.head_dim = c.head_dim;
  args.value_dim = s.c.value_dim;
  args.scale = static_cast<float>(c.logit_magnitude / std::sqrt(static_cast<double>(c.head_dim)));
  args.soft_cap = c.soft_cap;
  args.is_causal = c.causal;
  args.window_left = c.window_left;
  args.window_right = c.window_right;
  args.alibi_slopes = c.alibi ? s.slopes.data() : nullptr;
  args.sink_logits = c.sinks ? s.sinks.data() : nullptr;
  args.stage = c.stage;
  for (std::size_t b = 0; b < s.sequences.size(); ++b) {
    s.sequences[b].spans = s.spans[b].data();
    s.sequences[b].num_spans = c.spans;
  }
  args.sequences = s.sequences.data();
  args.num_sequences = c.batch;
  s.PlaceSpecials();
}

AttentionProblem::~AttentionProblem() = default;

const AttentionArgs& AttentionProblem::args() const { return storage_->args; }

AttentionArgs& AttentionProblem::args() { return storage_->args; }

bool AttentionProblem::NothingElseWritten() const {
  return storage_->output.buffer.NothingElseWritten() && storage_->lse.NothingElseWritten() &&
         storage_->weights.NothingElseWritten();
}

}  // namespace attn::reference
