// One query's scores on their way to probabilities, in place: soft cap, biases, masks, softmax.
// Included after math-inl.h. Rows are padded to whole panels, so that no loop over one has a tail:
// what lies beyond kv_len is -inf.

// One head of one sequence, and its scratch memory (standard_scratch.h).
struct HeadTask {
  const AttentionArgs& args;
  const Sequence& sequence;
  int64_t head;
  int64_t kv_head;
  const bool* cancelled;
  float* step;
  float* query;
  float* output;
  float* factors;
  float* scores;
  int64_t score_stride;
  int64_t out_stride;
};

template <ElementType kType>
inline const typename Elements<kType>::Type* RowOf(const RowsView& rows, int64_t row,
                                                   int64_t head) {
  return static_cast<const typename Elements<kType>::Type*>(rows.data) + row * rows.row_stride +
         head * rows.head_stride;
}

// scores[j - keys.begin] += mask, for visible keys. -inf hides the key even where its own score is
// NaN.
template <typename Read>
inline void AddMaskFrom(const KeyRange& keys, int64_t key_stride, Read read, float* scores) {
  const int64_t count = keys.end - keys.begin;
  if (key_stride == 1) {
    for (int64_t j = 0; j < count; ++j) {
      const float value = read(keys.begin + j);
      const float sum = scores[j] + value;
      scores[j] = value == -kInfinity ? value : sum;
    }
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    const float value = read((keys.begin + j) * key_stride);
    scores[j] = value == -kInfinity ? value : scores[j] + value;
  }
}

// `keys` are all visible to query `i`; their scores begin at `scores`.
inline void AddMask(const AttentionArgs& args, const Sequence& sequence, int64_t head, int64_t i,
                    const KeyRange& keys, float* scores) {
  const Mask& mask = args.mask;
  const int64_t at =
      sequence.mask_row * mask.batch_stride + head * mask.head_stride + i * mask.query_stride;
  const auto* const bytes = static_cast<const uint8_t*>(mask.data);
  const auto* const halves = reinterpret_cast<const uint16_t*>(bytes);
  const auto* const floats = reinterpret_cast<const float*>(bytes);
  switch (mask.type) {
    case MaskType::kBool:
      return AddMaskFrom(
          keys, mask.key_stride,
          [bytes, at](int64_t j) { return bytes[at + j] != 0 ? 0.0f : -kInfinity; }, scores);
    case MaskType::kFloat32:
      return AddMaskFrom(
          keys, mask.key_stride,
          [floats, at](int64_t j) {
            return Elements<ElementType::kFloat32>::LoadOne(floats + at + j);
          },
          scores);
    case MaskType::kFloat16:
      return AddMaskFrom(
          keys, mask.key_stride,
          [halves, at](int64_t j) { return WidenFloat16(LoadHalf(halves + at + j)); }, scores);
    case MaskType::kBFloat16:
      return AddMaskFrom(
          keys, mask.key_stride,
          [halves, at](int64_t j) { return WidenBFloat16(LoadHalf(halves + at + j)); }, scores);
    case MaskType::kNone:
      return;
  }
}

// Of query `i` against `keys`, whose scores begin at `scores`.
inline void AddAlibi(const AttentionArgs& args, const Sequence& sequence, int64_t head, int64_t i,
                     const KeyRange& keys, float* scores) {
  if (args.alibi_slopes == nullptr) return;
  const float slope = args.alibi_slopes[head];
  const int64_t position = sequence.first_query_position + i;
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const int64_t distance = position > j ? position - j : j - position;
    scores[j - keys.begin] -= slope * static_cast<float>(distance);
  }
}

// Position biases and masks; hidden keys of `held` become -inf, whatever their score was.
inline void ApplyBiases(const HeadTask& task, int64_t i, const KeyRange& held, float* row) {
  const KeyRange keys = VisibleKeys(task.args, task.sequence, i);
  for (int64_t j = held.begin; j < keys.begin; ++j) row[j] = -kInfinity;
  for (int64_t j = keys.end > held.begin ? keys.end : held.begin; j < held.end; ++j) {
    row[j] = -kInfinity;
  }
  AddAlibi(task.args, task.sequence, task.head, i, keys, row + keys.begin);
  AddMask(task.args, task.sequence, task.head, i, keys, row + keys.begin);
}

inline void WriteWeights(const HeadTask& task, int64_t i, const float* row, float factor) {
  const Sequence& sequence = task.sequence;
  const int64_t at = task.head * sequence.weights_head_stride + i * sequence.weights_row_stride;
  for (int64_t j = 0; j < sequence.kv_len; j += kLanes) {
    const int64_t count = sequence.kv_len - j < kLanes ? sequence.kv_len - j : kLanes;
    StoreFirst(Load(row + j) * factor, count, task.args.output_dtype, sequence.weights, at + j);
  }
}

// Of whole panels: kPanelVecs vectors at a time, so that maxima and sums do not wait for each
// other.
constexpr int kPanelVecs = static_cast<int>(kPanelWidth) / kLanes;

// The largest of the row's keys that is not NaN; -inf where there is none. `any_nan` tells whether
// one was.
inline float Largest(const float* row, const KeyRange& keys, bool* any_nan) {
  VecF largest[kPanelVecs];
  VecI nan = {};
  for (int i = 0; i < kPanelVecs; ++i) largest[i] = Broadcast(-kInfinity);
  for (int64_t j = keys.begin; j < keys.end; j += kPanelWidth) {
    for (int i = 0; i < kPanelVecs; ++i) {
      const VecF v = Load(row + j + i * kLanes);
      largest[i] = MaxOrSecond(v, largest[i]);
      nan |= v != v;
    }
  }
  for (int i = 1; i < kPanelVecs; ++i) largest[0] = MaxOrSecond(largest[i], largest[0]);
  *any_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (nan[lane] != 0) *any_nan = true;
  }
  return HorizontalMax(largest[0]);
}

// row[j] = e^(row[j] - shift); returns their sum.
inline float ExpShifted(const KeyRange& keys, float shift, float* row) {
  VecF sums[kPanelVecs] = {};
  for (int64_t j = keys.begin; j < keys.end; j += kPanelWidth) {
    for (int i = 0; i < kPanelVecs; ++i) {
      const VecF e = Exp(Load(row + j + i * kLanes) - shift);
      Store(e, row + j + i * kLanes);
      sums[i] += e;
    }
  }
  for (int i = 1; i < kPanelVecs; ++i) sums[0] += sums[i];
  return HorizontalSum(sums[0]);
}

// Turns row `i` of scores into unnormalised probabilities, writes the stage that is asked for and
// the LSE, and returns what the row's product with the values is to be multiplied with. It has
// scores of the keys `scored` alone, which hold all that it sees, and gets probabilities of their
// panels; of all keys where weights are asked for.
inline float SoftmaxRow(const HeadTask& task, int64_t i, KeyRange scored) {
  const AttentionArgs& args = task.args;
  const Sequence& sequence = task.sequence;
  const int64_t padded = (sequence.kv_len + kPanelWidth - 1) / kPanelWidth * kPanelWidth;
  float* const row = task.scores + i * task.score_stride;
  const ScoreStage stage = sequence.weights == nullptr ? ScoreStage::kNone : args.stage;
  scored.begin = scored.begin / kPanelWidth * kPanelWidth;
  scored.end = (scored.end + kPanelWidth - 1) / kPanelWidth * kPanelWidth;
  const KeyRange held = stage == ScoreStage::kNone ? scored : KeyRange{0, padded};
  if (stage == ScoreStage::kScaled) WriteWeights(task, i, row, 1.0f);
  if (args.soft_cap > 0.0f) {
    for (int64_t j = scored.begin; j < scored.end; j += kLanes) {
      Store(Tanh(Load(row + j) / args.soft_cap) * args.soft_cap, row + j);
    }
  }
  if (stage == ScoreStage::kSoftCapped) WriteWeights(task, i, row, 1.0f);
  ApplyBiases(task, i, held, row);
  if (stage == ScoreStage::kMasked) WriteWeights(task, i, row, 1.0f);

  bool any_nan = false;
  float largest = Largest(row, held, &any_nan);
  const float sink = args.sink_logits != nullptr ? args.sink_logits[task.head] : -kInfinity;
  if (!(sink <= largest)) largest = sink;
  float factor = 0.0f;
  float lse = -kInfinity;
  if (largest == -kInfinity && !any_nan) {
    for (int64_t j = held.begin; j < held.end; ++j) row[j] = 0.0f;  // sees nothing: not 0 / 0
  } else {
    float sum = ExpShifted(held, largest, row);
    if (sink != -kInfinity) sum += __builtin_expf(sink - largest);
    factor = 1.0f / sum;
    lse = largest + __builtin_logf(sum);
  }
  if (stage == ScoreStage::kProbabilities) WriteWeights(task, i, row, factor);
  if (sequence.lse != nullptr) {
    sequence.lse[i * sequence.lse_row_stride + task.head * sequence.lse_head_stride] = lse;
  }
  return factor;
}
