// One query's scores on their way to probabilities, in place: soft cap, biases, masks, softmax.
// Included after math-inl.h. Rows are padded to whole vectors, so that no loop over one has a tail:
// what lies beyond kv_len is -inf.

// One head of one sequence, and its scratch memory.
struct HeadTask {
  const AttentionArgs& args;
  const Sequence& sequence;
  int64_t head;
  int64_t kv_head;
  const bool* cancelled;
  float* panel;          // [head_dim][kPanel]
  float* query;          // [q_len][head_dim]
  float* scores;         // [q_len][score_stride]
  int64_t score_stride;  // kv_len and room for the overhang of the last panel
};

// Keys that position and the mask's extent let row `i` see: [begin, end).
struct KeyRange {
  int64_t begin;
  int64_t end;
};

// Compares before it adds: a window may be as large as int64_t allows.
inline KeyRange VisibleKeys(const AttentionArgs& args, const Sequence& sequence, int64_t i) {
  const int64_t position = sequence.first_query_position + i;
  KeyRange keys = {0, sequence.kv_len};
  if (args.mask.type != MaskType::kNone && args.mask.kv_extent < keys.end) {
    keys.end = args.mask.kv_extent;
  }
  if (args.is_causal && position < keys.end) keys.end = position + 1;
  if (args.window_right >= 0 && args.window_right < keys.end - 1 - position) {
    keys.end = position + args.window_right + 1;
  }
  if (args.window_left >= 0 && args.window_left < position)
    keys.begin = position - args.window_left;
  if (keys.end <= keys.begin) keys.begin = keys.end = 0;
  return keys;
}

// row[j] += mask, for visible keys. -inf hides the key even where its own score is NaN.
template <typename Read>
inline void AddMask(const KeyRange& keys, int64_t key_stride, Read read, float* row) {
  if (key_stride == 1) {
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const float value = read(j);
      const float sum = row[j] + value;
      row[j] = value == -kInfinity ? value : sum;
    }
    return;
  }
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const float value = read(j * key_stride);
    row[j] = value == -kInfinity ? value : row[j] + value;
  }
}

inline void ApplyMask(const HeadTask& task, int64_t i, const KeyRange& keys, float* row) {
  const Mask& mask = task.args.mask;
  const int64_t at = task.sequence.mask_row * mask.batch_stride + task.head * mask.head_stride +
                     i * mask.query_stride;
  const auto* const bytes = static_cast<const uint8_t*>(mask.data);
  const auto* const halves = reinterpret_cast<const uint16_t*>(bytes);
  const auto* const floats = reinterpret_cast<const float*>(bytes);
  switch (mask.type) {
    case MaskType::kBool:
      return AddMask(
          keys, mask.key_stride,
          [bytes, at](int64_t j) { return bytes[at + j] != 0 ? 0.0f : -kInfinity; }, row);
    case MaskType::kFloat32:
      return AddMask(
          keys, mask.key_stride,
          [floats, at](int64_t j) {
            return Elements<ElementType::kFloat32>::LoadOne(floats + at + j);
          },
          row);
    case MaskType::kFloat16:
      return AddMask(
          keys, mask.key_stride,
          [halves, at](int64_t j) { return WidenFloat16(LoadHalf(halves + at + j)); }, row);
    case MaskType::kBFloat16:
      return AddMask(
          keys, mask.key_stride,
          [halves, at](int64_t j) { return WidenBFloat16(LoadHalf(halves + at + j)); }, row);
    case MaskType::kNone:
      return;
  }
}

// Position biases and masks; hidden keys become -inf, whatever their score was.
inline void ApplyBiases(const HeadTask& task, int64_t i, float* row) {
  const KeyRange keys = VisibleKeys(task.args, task.sequence, i);
  for (int64_t j = 0; j < keys.begin; ++j) row[j] = -kInfinity;
  for (int64_t j = keys.end; j < task.sequence.kv_len; ++j) row[j] = -kInfinity;
  if (task.args.alibi_slopes != nullptr) {
    const float slope = task.args.alibi_slopes[task.head];
    const int64_t position = task.sequence.first_query_position + i;
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const int64_t distance = position > j ? position - j : j - position;
      row[j] -= slope * static_cast<float>(distance);
    }
  }
  ApplyMask(task, i, keys, row);
}

inline void WriteWeights(const HeadTask& task, int64_t i, const float* row, float factor) {
  const Sequence& sequence = task.sequence;
  const int64_t at = task.head * sequence.weights_head_stride + i * sequence.weights_row_stride;
  for (int64_t j = 0; j < sequence.kv_len; j += kLanes) {
    const int64_t count = sequence.kv_len - j < kLanes ? sequence.kv_len - j : kLanes;
    StoreFirst(Load(row + j) * factor, count, task.args.output_dtype, sequence.weights, at + j);
  }
}

// The largest of `row` that is not NaN; -inf where there is none. `any_nan` tells whether one was.
inline float Largest(const float* row, int64_t kv_len, bool* any_nan) {
  VecF largest = Broadcast(-kInfinity);
  VecI nan = {};
  for (int64_t j = 0; j < kv_len; j += kLanes) {
    const VecF v = Load(row + j);
    largest = v > largest ? v : largest;
    nan |= v != v;
  }
  float result = -kInfinity;
  *any_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (largest[lane] > result) result = largest[lane];
    if (nan[lane] != 0) *any_nan = true;
  }
  return result;
}

// row[j] = e^(row[j] - shift); returns their sum.
inline float ExpShifted(int64_t kv_len, float shift, float* row) {
  VecF sums = {};
  for (int64_t j = 0; j < kv_len; j += kLanes) {
    const VecF e = Exp(Load(row + j) - shift);
    Store(e, row + j);
    sums += e;
  }
  return HorizontalSum(sums);
}

// Turns row `i` of scores into unnormalised probabilities, writes the stage that is asked for and
// the LSE, and returns what the row's product with the values is to be multiplied with.
inline float SoftmaxRow(const HeadTask& task, int64_t i) {
  const AttentionArgs& args = task.args;
  const Sequence& sequence = task.sequence;
  const int64_t kv_len = sequence.kv_len;
  float* const row = task.scores + i * task.score_stride;
  const ScoreStage stage = sequence.weights == nullptr ? ScoreStage::kNone : args.stage;
  if (stage == ScoreStage::kScaled) WriteWeights(task, i, row, 1.0f);
  if (args.soft_cap > 0.0f) {
    for (int64_t j = 0; j < kv_len; j += kLanes) {
      Store(Tanh(Load(row + j) / args.soft_cap) * args.soft_cap, row + j);
    }
  }
  if (stage == ScoreStage::kSoftCapped) WriteWeights(task, i, row, 1.0f);
  ApplyBiases(task, i, row);
  for (int64_t j = kv_len; j < kv_len + kLanes; ++j) row[j] = -kInfinity;
  if (stage == ScoreStage::kMasked) WriteWeights(task, i, row, 1.0f);

  bool any_nan = false;
  float largest = Largest(row, kv_len, &any_nan);
  const float sink = args.sink_logits != nullptr ? args.sink_logits[task.head] : -kInfinity;
  if (!(sink <= largest)) largest = sink;
  float factor = 0.0f;
  float lse = -kInfinity;
  if (largest == -kInfinity && !any_nan) {
    for (int64_t j = 0; j < kv_len; ++j) row[j] = 0.0f;  // sees nothing: zero, not 0 / 0
  } else {
    float sum = ExpShifted(kv_len, largest, row);
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
