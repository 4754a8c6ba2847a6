// The standard kernel's task: queries in, rows out, few rows by themselves, and the order of it
// all. Included after standard_attention-inl.h.

// Blocks of rows interleaved: [q_len / kBlockRows][head_dim][kBlockRows]. Missing rows repeat the
// last.
template <ElementType kType>
bool PackHeadQueries(const HeadTask& task) {
  const int64_t head_dim = task.args.head_dim;
  const int64_t last = task.sequence.q_len - 1;
  for (int64_t first = 0; first <= last; first += kBlockRows) {
    if (IsCancelled(task.cancelled)) return false;
    float* const block = task.query + first * head_dim;
    const typename Elements<kType>::Type* rows[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r) {
      rows[r] = RowOf<kType>(task.sequence.query, first + r < last ? first + r : last, task.head);
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      for (int r = 0; r < kBlockRows; ++r) {
        block[d * kBlockRows + r] = Elements<kType>::LoadOne(rows[r] + d);
      }
    }
  }
  return true;
}

template <ElementType kType>
bool WidenHeadQueries(const HeadTask& task) {
  const int64_t head_dim = task.args.head_dim;
  for (int64_t row = 0; row < task.sequence.q_len; ++row) {
    const auto* const from = RowOf<kType>(task.sequence.query, row, task.head);
    for (int64_t d = 0; d < head_dim; ++d) {
      task.query[row * head_dim + d] = Elements<kType>::LoadOne(from + d);
    }
  }
  return true;
}

template <ElementType kType>
bool TakeQueries(const HeadTask& task, bool few) {
  return few ? WidenHeadQueries<kType>(task) : PackHeadQueries<kType>(task);
}

inline bool TakeQueriesOfAnyType(const HeadTask& task, bool few) {
  switch (task.args.dtype) {
    case ElementType::kFloat32:
      return TakeQueries<ElementType::kFloat32>(task, few);
    case ElementType::kFloat16:
      return TakeQueries<ElementType::kFloat16>(task, few);
    case ElementType::kBFloat16:
      return TakeQueries<ElementType::kBFloat16>(task, few);
    case ElementType::kInt8:
      break;  // of pages alone
  }
  return false;
}

template <ElementType kType>
inline float Dot(const float* query, const typename Elements<kType>::Type* key, int64_t head_dim) {
  VecF acc[2] = {};
  int64_t d = 0;
  for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
    for (int i = 0; i < 2; ++i) {
      acc[i] += Load(query + d + i * kLanes) * Elements<kType>::LoadVec(key + d + i * kLanes);
    }
  }
  for (; d < head_dim; d += kLanes) {
    const int64_t count = head_dim - d < kLanes ? head_dim - d : kLanes;
    acc[0] += LoadFirst<ElementType::kFloat32>(query + d, count) * LoadFirst<kType>(key + d, count);
  }
  return HorizontalSum(acc[0] + acc[1]);
}

template <ElementType kType>
bool ScoreFewRows(const HeadTask& task, const KeyRange& keys) {
  int64_t start = 0;  // key where the span begins
  for (int64_t s = 0; s < task.sequence.num_spans; ++s) {
    const KeyValueSpan& span = task.sequence.spans[s];
    const int64_t end = Clamp(keys.end, start, start + span.length);
    for (int64_t j = Clamp(keys.begin, start, end); j < end; ++j) {
      if (j % kKeysBetweenLooks == 0 && IsCancelled(task.cancelled)) return false;
      const auto* const key = RowOf<kType>(span.key, j - start, task.kv_head);
      for (int64_t row = 0; row < task.sequence.q_len; ++row) {
        const float* const query = task.query + row * task.args.head_dim;
        task.scores[row * task.score_stride + j] =
            Dot<kType>(query, key, task.args.head_dim) * task.args.scale;
      }
    }
    start += span.length;
  }
  return true;
}

// `count` <= kLanes columns of row `row` of the output.
inline void StoreOutput(const HeadTask& task, VecF v, int64_t row, int64_t column, int64_t count) {
  const MutableRowsView& output = task.sequence.output;
  StoreFirst(v, count, task.args.output_dtype, output.data,
             row * output.row_stride + task.head * output.head_stride + column);
}

// One row of probabilities times kVecs vectors of columns, of which the last has `last` <= kLanes;
// written to the output. What the row does not see is left out: its value may be NaN.
template <ElementType kType, int kVecs>
inline bool WeighColumns(const HeadTask& task, int64_t row, const KeyRange& keys, int64_t column,
                         int64_t last) {
  VecF acc[kVecs] = {};
  const float* const weights = task.scores + row * task.score_stride;
  int64_t start = 0;  // key where the span begins
  for (int64_t s = 0; s < task.sequence.num_spans; ++s) {
    const KeyValueSpan& span = task.sequence.spans[s];
    const int64_t end = Clamp(keys.end, start, start + span.length);
    for (int64_t j = Clamp(keys.begin, start, end); j < end; ++j) {
      if (j % kKeysBetweenLooks == 0 && IsCancelled(task.cancelled)) return false;
      if (weights[j] == 0.0f) continue;
      const auto* const value = RowOf<kType>(span.value, j - start, task.kv_head) + column;
      const VecF p = Broadcast(weights[j]);
      for (int i = 0; i < kVecs - 1; ++i) {
        acc[i] += p * Elements<kType>::LoadVec(value + i * kLanes);
      }
      acc[kVecs - 1] += p * LoadFirst<kType>(value + (kVecs - 1) * kLanes, last);
    }
    start += span.length;
  }
  for (int i = 0; i < kVecs; ++i) {
    StoreOutput(task, acc[i] * task.factors[row], row, column + i * kLanes,
                i == kVecs - 1 ? last : kLanes);
  }
  return true;
}

// A few rows' products straight from the values.
template <ElementType kType>
void WriteFewRows(const HeadTask& task, const KeyRange& keys) {
  constexpr int kVecs = 4;
  const int64_t value_dim = task.args.value_dim;
  for (int64_t row = 0; row < task.sequence.q_len; ++row) {
    int64_t column = 0;
    for (; column + kVecs * kLanes <= value_dim; column += kVecs * kLanes) {
      if (!WeighColumns<kType, kVecs>(task, row, keys, column, kLanes)) return;
    }
    for (; column < value_dim; column += kLanes) {
      const int64_t last = value_dim - column < kLanes ? value_dim - column : kLanes;
      if (!WeighColumns<kType, 1>(task, row, keys, column, last)) return;
    }
  }
}

inline bool NormaliseRows(const HeadTask& task) {
  for (int64_t first = 0; first < task.sequence.q_len; first += cpu::kStandardGroupRows) {
    const KeyRange scored = cpu::ScoredKeys(task.args, task.sequence, first);
    const int64_t left = task.sequence.q_len - first;
    const int64_t rows = left < cpu::kStandardGroupRows ? left : cpu::kStandardGroupRows;
    for (int64_t row = first; row < first + rows; ++row) {
      if (IsCancelled(task.cancelled)) return false;
      task.factors[row] = SoftmaxRow(task, row, scored);
    }
  }
  return true;
}

template <ElementType kType>
void RunFewRows(const HeadTask& task) {
  if (!ScoreFewRows<kType>(task, cpu::ScoredKeys(task.args, task.sequence, 0))) return;
  if (!NormaliseRows(task)) return;
  WriteFewRows<kType>(task, cpu::GroupKeys(task.args, task.sequence, 0));
}

inline void RunManyRows(const HeadTask& task) {
  const int64_t floats = task.sequence.q_len * task.out_stride;
  if (!MultiplyHead(task, Product::kScores) || !NormaliseRows(task)) return;
  __builtin_memset(task.output, 0, static_cast<size_t>(floats) * sizeof(float));
  if (!MultiplyHead(task, Product::kValues)) return;
  for (int64_t row = 0; row < task.sequence.q_len; ++row) {
    if (row % cpu::kStandardGroupRows == 0 && IsCancelled(task.cancelled)) return;
    for (int64_t column = 0; column < task.args.value_dim; column += kLanes) {
      const int64_t left = task.args.value_dim - column;
      StoreOutput(task, Load(task.output + row * task.out_stride + column) * task.factors[row], row,
                  column, left < kLanes ? left : kLanes);
    }
  }
}

inline void StandardAttentionTask(const AttentionArgs& args, int64_t index, void* workspace,
                                  const bool* cancelled) {
  const Sequence& sequence = args.sequences[index / args.num_heads];
  const int64_t head = index % args.num_heads;
  const int64_t kv_head = head / (args.num_heads / args.num_kv_heads);
  const bool few = sequence.q_len < cpu::kStandardFewRows;
  float* const memory = static_cast<float*>(workspace);
  const cpu::StandardScratch parts =
      cpu::DivideStandardScratch(sequence.q_len, args.head_dim, args.value_dim);
  const HeadTask task = {args,
                         sequence,
                         head,
                         kv_head,
                         cancelled,
                         memory + parts.step,
                         memory + parts.query,
                         memory + parts.output,
                         memory + parts.factors,
                         memory + parts.scores,
                         cpu::StandardScoreStride(sequence.kv_len),
                         cpu::RoundUpToPanel(args.value_dim)};
  if (IsCancelled(cancelled) || !TakeQueriesOfAnyType(task, few)) return;
  if (!few) return RunManyRows(task);
  switch (args.kv_dtype) {
    case ElementType::kFloat32:
      return RunFewRows<ElementType::kFloat32>(task);
    case ElementType::kFloat16:
      return RunFewRows<ElementType::kFloat16>(task);
    case ElementType::kBFloat16:
      return RunFewRows<ElementType::kBFloat16>(task);
    case ElementType::kInt8:
      return;  // of pages alone, which are unpacked before this kernel sees them
  }
}
