// The text of standard_attention.h, over score_row-inl.h. One task is one head of one sequence:
// scores first (keys transposed a panel at a time, kRows queries against each), then each row's
// options, masks and softmax in place, then the product with the values, a panel of columns at a
// time. kRows * kPanelVecs accumulators stay in registers. Traffic: keys once; queries once per
// panel; values once for every kRows queries; scores are written and read a few times. Rejected:
// scores of kRows queries at a time, which is less memory and no longer the plain algorithm.

// Accumulators are as many as the registers hold beside a panel's operands and a broadcast.
constexpr int kRows = kLanes == 4 ? 4 : 6;
constexpr int kPanelVecs = kLanes == 16 ? 4 : 2;
constexpr int kPanel = kPanelVecs * kLanes;  // keys of a panel; columns of a product
static_assert(kPanel <= kMaxPanelKeys, "the workspace is planned for kMaxPanelKeys");
constexpr int64_t kKeysBetweenLooks = 2048;  // at `cancelled`

template <ElementType kType>
inline const typename Elements<kType>::Type* RowOf(const RowsView& rows, int64_t row,
                                                   int64_t head) {
  return static_cast<const typename Elements<kType>::Type*>(rows.data) + row * rows.row_stride +
         head * rows.head_stride;
}

// Walks over keys across spans, empty ones too.
struct KeyCursor {
  const KeyValueSpan* span;
  int64_t index;  // within the span

  void Settle() {
    while (index >= span->length) {
      index -= span->length;
      ++span;
    }
  }
};

// The next `count` <= kPanel keys as [head_dim][kPanel]; missing ones are zero.
template <ElementType kType>
void PackKeys(const HeadTask& task, int64_t count, KeyCursor* cursor) {
  const int64_t head_dim = task.args.head_dim;
  for (int64_t key = 0; key < count; ++key) {
    cursor->Settle();
    const auto* const from = RowOf<kType>(cursor->span->key, cursor->index, task.kv_head);
    float* const to = task.panel + key;
    for (int64_t d = 0; d < head_dim; ++d) to[d * kPanel] = Elements<kType>::LoadOne(from + d);
    ++cursor->index;
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    for (int64_t key = count; key < kPanel; ++key) task.panel[d * kPanel + key] = 0.0f;
  }
}

// Scores of kCount queries against one panel, its overhang included.
template <int kCount>
inline void ScorePanel(const HeadTask& task, int64_t row, int64_t key) {
  const int64_t head_dim = task.args.head_dim;
  const float* const query = task.query + row * head_dim;
  VecF acc[kCount][kPanelVecs] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    VecF keys[kPanelVecs];
    for (int i = 0; i < kPanelVecs; ++i) keys[i] = Load(task.panel + d * kPanel + i * kLanes);
    for (int r = 0; r < kCount; ++r) {
      const VecF q = Broadcast(query[r * head_dim + d]);
      for (int i = 0; i < kPanelVecs; ++i) acc[r][i] += q * keys[i];
    }
  }
  for (int r = 0; r < kCount; ++r) {
    float* const to = task.scores + (row + r) * task.score_stride + key;
    for (int i = 0; i < kPanelVecs; ++i) Store(acc[r][i] * task.args.scale, to + i * kLanes);
  }
}

template <ElementType kType>
bool FormScores(const HeadTask& task) {
  const int64_t q_len = task.sequence.q_len;
  const int64_t kv_len = task.sequence.kv_len;
  KeyCursor cursor = {task.sequence.spans, 0};
  for (int64_t key = 0; key < kv_len; key += kPanel) {
    PackKeys<kType>(task, kv_len - key < kPanel ? kv_len - key : kPanel, &cursor);
    for (int64_t row = 0; row < q_len;) {
      if (IsCancelled(task.cancelled)) return false;
      if (q_len - row >= kRows) {
        ScorePanel<kRows>(task, row, key);
        row += kRows;
      } else {
        ScorePanel<1>(task, row, key);
        ++row;
      }
    }
  }
  return true;
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

// For fewer than kRows queries: transposing keys would cost more than it saves.
template <ElementType kType>
bool FormScoresOfFewRows(const HeadTask& task) {
  int64_t j = 0;
  for (int64_t s = 0; s < task.sequence.num_spans; ++s) {
    const KeyValueSpan& span = task.sequence.spans[s];
    for (int64_t index = 0; index < span.length; ++index, ++j) {
      if (j % kKeysBetweenLooks == 0 && IsCancelled(task.cancelled)) return false;
      const auto* const key = RowOf<kType>(span.key, index, task.kv_head);
      for (int64_t row = 0; row < task.sequence.q_len; ++row) {
        const float* const query = task.query + row * task.args.head_dim;
        task.scores[row * task.score_stride + j] =
            Dot<kType>(query, key, task.args.head_dim) * task.args.scale;
      }
    }
  }
  return true;
}

template <ElementType kType>
void WidenQueriesFrom(const HeadTask& task) {
  const int64_t head_dim = task.args.head_dim;
  for (int64_t row = 0; row < task.sequence.q_len; ++row) {
    const auto* const from = RowOf<kType>(task.sequence.query, row, task.head);
    float* const to = task.query + row * head_dim;
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) Store(Elements<kType>::LoadVec(from + d), to + d);
    for (; d < head_dim; ++d) to[d] = Elements<kType>::LoadOne(from + d);
  }
}

inline void WidenQueries(const HeadTask& task) {
  switch (task.args.dtype) {
    case ElementType::kFloat32:
      return WidenQueriesFrom<ElementType::kFloat32>(task);
    case ElementType::kFloat16:
      return WidenQueriesFrom<ElementType::kFloat16>(task);
    case ElementType::kBFloat16:
      return WidenQueriesFrom<ElementType::kBFloat16>(task);
    case ElementType::kInt8:
      return;  // of pages alone
  }
}

// All values are finite: then 0 * v is 0, and keys that a row does not see need no care.
template <ElementType kType>
bool AllFinite(const HeadTask& task) {
  for (int64_t s = 0; s < task.sequence.num_spans; ++s) {
    const KeyValueSpan& span = task.sequence.spans[s];
    for (int64_t row = 0; row < span.length; ++row) {
      if (row % kKeysBetweenLooks == 0 && IsCancelled(task.cancelled)) return false;
      const auto* const from = RowOf<kType>(span.value, row, task.kv_head);
      VecF zero = {};
      for (int64_t c = 0; c < task.args.value_dim; c += kLanes) {
        const int64_t left = task.args.value_dim - c;
        zero += LoadFirst<kType>(from + c, left < kLanes ? left : kLanes) * 0.0f;
      }
      if (!(HorizontalSum(zero) == 0.0f)) return false;
    }
  }
  return true;
}

// kCount rows of probabilities times kVecs vectors of columns, of which the last has `last` <=
// kLanes; written to the output. A single row leaves out what it does not see; several rows at a
// time need values that are all finite.
template <ElementType kType, int kCount, int kVecs>
inline void WeighColumns(const HeadTask& task, int64_t row, int64_t column, int64_t last,
                         const float* factors) {
  VecF acc[kCount][kVecs] = {};
  const int64_t stride = task.score_stride;
  const float* weight = task.scores + row * stride;
  for (int64_t s = 0; s < task.sequence.num_spans; ++s) {
    const KeyValueSpan& span = task.sequence.spans[s];
    const int64_t value_stride = span.value.row_stride;
    const auto* value = RowOf<kType>(span.value, 0, task.kv_head) + column;
    for (int64_t index = 0; index < span.length; ++index, ++weight, value += value_stride) {
      if (index % kKeysBetweenLooks == 0 && IsCancelled(task.cancelled)) return;
      if (kCount == 1 && *weight == 0.0f) continue;
      VecF values[kVecs];
      for (int i = 0; i < kVecs - 1; ++i) values[i] = Elements<kType>::LoadVec(value + i * kLanes);
      values[kVecs - 1] = LoadFirst<kType>(value + (kVecs - 1) * kLanes, last);
      for (int r = 0; r < kCount; ++r) {
        const VecF p = Broadcast(weight[r * stride]);
        for (int i = 0; i < kVecs; ++i) acc[r][i] += p * values[i];
      }
    }
  }
  const MutableRowsView& output = task.sequence.output;
  for (int r = 0; r < kCount; ++r) {
    const int64_t at = (row + r) * output.row_stride + task.head * output.head_stride + column;
    for (int i = 0; i < kVecs; ++i) {
      StoreFirst(acc[r][i] * factors[r], i == kVecs - 1 ? last : kLanes, task.args.output_dtype,
                 output.data, at + i * kLanes);
    }
  }
}

// Rows [row, row + kCount) of the output.
template <ElementType kType, int kCount>
void WriteRows(const HeadTask& task, int64_t row, const float* factors) {
  const int64_t value_dim = task.args.value_dim;
  int64_t column = 0;
  for (; column + kPanel <= value_dim; column += kPanel) {
    WeighColumns<kType, kCount, kPanelVecs>(task, row, column, kLanes, factors);
  }
  for (; column < value_dim; column += kLanes) {
    const int64_t last = value_dim - column < kLanes ? value_dim - column : kLanes;
    WeighColumns<kType, kCount, 1>(task, row, column, last, factors);
  }
}

template <ElementType kType>
void RunTask(const HeadTask& task) {
  const int64_t q_len = task.sequence.q_len;
  WidenQueries(task);
  const bool few = q_len < kRows;
  if (!(few ? FormScoresOfFewRows<kType>(task) : FormScores<kType>(task))) return;
  const bool together = !few && AllFinite<kType>(task);
  const int64_t step = together ? kRows : 1;
  for (int64_t row = 0; row < q_len; row += step) {
    const int64_t count = q_len - row < step ? q_len - row : step;
    float factors[kRows];
    for (int64_t r = 0; r < count; ++r) {
      if (IsCancelled(task.cancelled)) return;
      factors[r] = SoftmaxRow(task, row + r);
    }
    if (count == kRows) {
      WriteRows<kType, kRows>(task, row, factors);
      continue;
    }
    for (int64_t r = 0; r < count; ++r) WriteRows<kType, 1>(task, row + r, factors + r);
  }
}

inline void StandardAttentionTask(const AttentionArgs& args, int64_t index, void* workspace,
                                  const bool* cancelled) {
  const Sequence& sequence = args.sequences[index / args.num_heads];
  const int64_t head = index % args.num_heads;
  float* const panel = static_cast<float*>(workspace);
  float* const query = panel + kPanel * args.head_dim;
  const HeadTask task = {args,
                         sequence,
                         head,
                         head / (args.num_heads / args.num_kv_heads),
                         cancelled,
                         panel,
                         query,
                         query + sequence.q_len * args.head_dim,
                         sequence.kv_len + kPanel};
  switch (args.kv_dtype) {
    case ElementType::kFloat32:
      return RunTask<ElementType::kFloat32>(task);
    case ElementType::kFloat16:
      return RunTask<ElementType::kFloat16>(task);
    case ElementType::kBFloat16:
      return RunTask<ElementType::kBFloat16>(task);
    case ElementType::kInt8:
      return;  // of pages alone, which are unpacked before this kernel sees them
  }
}
