// The text of standard_attention.h, over score_row-inl.h and the register blocks' shapes of
// flash_tile-inl.h. One task is one head of one sequence: scores first, then each row's options,
// masks and softmax in place, then the product with the values. Keys and values are packed a step
// of pages at a time into float32 panels, which all rows meet, a tile of rows that stays in the
// second-level cache at a time. Traffic: keys and values once; queries and outputs once per step;
// scores are written twice and read twice. Rejected: scores of a tile of rows at a time, which is
// less memory and no longer the plain algorithm.

constexpr int64_t kTileGroups = 8;
constexpr int64_t kKeysBetweenLooks = 2048;  // at `cancelled`
constexpr int64_t kFullWidth = static_cast<int64_t>(kBlockVecs) * kLanes;
constexpr int64_t kColumnsAtOnce = kFullWidth > kPanelWidth ? kFullWidth : kPanelWidth;
static_assert(cpu::kStandardGroupRows % kBlockRows == 0, "groups are whole blocks");
static_assert(cpu::kStandardStepPages == cpu::kFlashStepPages, "StepValues is a step's");

// The keys that are packed at a time.
struct HeadStep {
  int64_t first;  // key
  int64_t count;
};

// The groups of a tile of rows, and the part of a step that each takes, in keys from its first.
struct HeadTile {
  int64_t first_row;
  int64_t groups;
  KeyRange keys[kTileGroups];
};

enum class Product { kScores, kValues };

// False: no row of the tile takes any of the step.
inline bool TakeTile(const HeadTask& task, const HeadStep& step, Product product, HeadTile* tile) {
  bool any = false;
  tile->groups = 0;
  for (int64_t row = tile->first_row; row < task.sequence.q_len && tile->groups < kTileGroups;
       row += cpu::kStandardGroupRows) {
    const KeyRange keys = product == Product::kScores
                              ? cpu::ScoredKeys(task.args, task.sequence, row)
                              : cpu::GroupKeys(task.args, task.sequence, row);
    KeyRange& own = tile->keys[tile->groups++];
    own.begin = Clamp(keys.begin - step.first, 0, kStepKeys);
    own.end = Clamp(keys.end - step.first, 0, kStepKeys);
    any |= own.begin < own.end;
  }
  return any;
}

inline const char* TokenOf(const RowsView& rows, int64_t row, int64_t head, int64_t item) {
  return static_cast<const char*>(rows.data) +
         (row * rows.row_stride + head * rows.head_stride) * item;
}

// The keys or the values of the step as float32 pages, one behind the other. Keys that are missing
// in the last page are zeros.
inline void PackStep(const HeadTask& task, const HeadStep& step, Product product) {
  const PageLayout layout = {ElementType::kFloat32, task.args.head_dim, task.args.value_dim};
  const int64_t item = PageLayout{task.args.kv_dtype}.item_size();
  const bool keys = product == Product::kScores;
  const int64_t width = keys ? task.args.head_dim : layout.padded_value_dim();
  if (keys && step.count % kPageTokens != 0) {
    float* const page = task.step + step.count / kPageTokens * kPageTokens * width;
    __builtin_memset(page, 0, static_cast<size_t>(kPageTokens * width) * sizeof(float));
  }
  int64_t start = 0;  // key where the span begins
  for (int64_t s = 0; s < task.sequence.num_spans; ++s) {
    const KeyValueSpan& span = task.sequence.spans[s];
    const int64_t end = Clamp(start + span.length - step.first, 0, step.count);
    for (int64_t at = Clamp(start - step.first, 0, step.count); at < end;) {
      const int64_t index = step.first + at - start;
      const int64_t page_end = (at / kPageTokens + 1) * kPageTokens;
      const cpu::PageRange range = {at % kPageTokens, (page_end < end ? page_end : end) - at};
      const cpu::TokenRows rows = {task.args.kv_dtype, TokenOf(span.key, index, task.kv_head, item),
                                   TokenOf(span.value, index, task.kv_head, item),
                                   span.key.row_stride, span.value.row_stride};
      float* const page = task.step + at / kPageTokens * kPageTokens * width;
      if (keys) {
        PackKeysOfPage(layout, rows, range, page);
      } else {
        PackValuesOfPage(layout, rows, range, page);
      }
      at += range.count;
    }
    start += span.length;
  }
}

// scores[r][key] of kM queries against kN vectors of packed keys.
template <int kM, int kN>
[[gnu::noinline]] void ScoreHeadBlock(const HeadTask& task, const float* query, const float* keys,
                                      float* scores) {
  const int64_t head_dim = task.args.head_dim;
  VecF acc[kM][kN];
  StartBlock(nullptr, 0, acc);
  for (int64_t d = 0; d < head_dim; ++d) {
    VecF k[kN];
    for (int i = 0; i < kN; ++i) k[i] = Load(keys + VecOffset(i, kLanes, head_dim * kPanelWidth));
    for (int r = 0; r < kM; ++r) {
      const VecF q = Broadcast(query[r]);
      for (int i = 0; i < kN; ++i) acc[r][i] += q * k[i];
    }
    query += kBlockRows;
    keys += kPanelWidth;
  }
  const float scale = task.args.scale;
  for (int r = 0; r < kM; ++r) {
    for (int i = 0; i < kN; ++i)
      Store(acc[r][i] * scale, scores + r * task.score_stride + i * kLanes);
  }
}

// Where the packed keys of the step begin from `key` on.
inline const float* KeysAt(const HeadTask& task, int64_t key) {
  return task.step + PageLayout{ElementType::kFloat32, task.args.head_dim}.KeyElement(key, 0);
}

// `rows` <= kM rows from `row` on against the packed keys [keys.begin, keys.end), whole panels.
template <int kM>
void ScoreHeadRows(const HeadTask& task, int64_t rows, int64_t row, const HeadStep& step,
                   const KeyRange& keys) {
  if constexpr (kM > 1) {
    if (rows < kM) return ScoreHeadRows<kM - 1>(task, rows, row, step, keys);
  }
  constexpr int kN = VecsFor(kM);
  const float* const query = task.query + row * task.args.head_dim;
  float* const scores = task.scores + row * task.score_stride + step.first;
  int64_t key = keys.begin;
  for (; key + kN * kLanes <= keys.end; key += kN * kLanes) {
    ScoreHeadBlock<kM, kN>(task, query, KeysAt(task, key), scores + key);
  }
  if constexpr (kN > kVecsPerPanel) {
    for (; key < keys.end; key += kPanelWidth) {
      ScoreHeadBlock<kM, kVecsPerPanel>(task, query, KeysAt(task, key), scores + key);
    }
  }
}

// out[r][column] += the weights of the tokens [values.begin, values.end) times their values, kN
// vectors of columns. kSkipsZeros (of one row): what has no weight is left out, as 0 * inf is not
// 0.
template <int kM, int kN, bool kSkipsZeros>
[[gnu::noinline]] void WeighHeadBlock(const HeadTask& task, const float* weights,
                                      const StepValues& values, int64_t column, float* out) {
  static_assert(kM == 1 || !kSkipsZeros, "rows differ in what they see");
  typedef Panel<ElementType::kFloat32> P;
  const int64_t stride = task.score_stride;
  VecF acc[kM][kN];
  StartBlock(nullptr, 0, acc);
  for (int64_t at = values.begin; at < values.end;) {
    const int64_t page_end = (at / kPageTokens + 1) * kPageTokens;
    const int64_t end = page_end < values.end ? page_end : values.end;
    const char* value = ValuesAt<P>(values, at, column);
    for (; at < end; ++at, value += kPanelWidth * P::kBytes) {
      const float* const weight = weights + at;
      if (kSkipsZeros && *weight == 0.0f) continue;
      VecF v[kN];
      for (int i = 0; i < kN; ++i) {
        v[i] = P::Get(value + VecOffset(i, kLanes * P::kBytes, ValuePanelBytes<P>()), 0);
      }
      for (int r = 0; r < kM; ++r) {
        const VecF w = Broadcast(weight[r * stride]);
        for (int i = 0; i < kN; ++i) acc[r][i] += w * v[i];
      }
    }
  }
  for (int r = 0; r < kM; ++r) {
    for (int i = 0; i < kN; ++i) {
      float* const to = out + r * task.out_stride + i * kLanes;
      Store(Load(to) + acc[r][i], to);
    }
  }
}

// `rows` <= kM rows from `row` on, columns [column, column + kColumnsAtOnce) of those that there
// are.
template <int kM>
void WeighHeadRows(const HeadTask& task, int64_t rows, int64_t row, int64_t first_key,
                   const StepValues& values, int64_t column) {
  if constexpr (kM > 1) {
    if (rows < kM) return WeighHeadRows<kM - 1>(task, rows, row, first_key, values, column);
  }
  constexpr int kN = VecsFor(kM);
  const int64_t end =
      column + kColumnsAtOnce < values.columns ? column + kColumnsAtOnce : values.columns;
  const float* const weights = task.scores + row * task.score_stride + first_key;
  float* const out = task.output + row * task.out_stride;
  for (; column + kN * kLanes <= end; column += kN * kLanes) {
    WeighHeadBlock<kM, kN, false>(task, weights, values, column, out + column);
  }
  if constexpr (kN > kVecsPerPanel) {
    for (; column < end; column += kPanelWidth) {
      WeighHeadBlock<kM, kVecsPerPanel, false>(task, weights, values, column, out + column);
    }
  }
}

// The same for values that are not all finite.
inline void WeighHeadRowsCarefully(const HeadTask& task, int64_t rows, int64_t row,
                                   int64_t first_key, const StepValues& values, int64_t column) {
  const int64_t end =
      column + kColumnsAtOnce < values.columns ? column + kColumnsAtOnce : values.columns;
  for (int64_t r = row; r < row + rows; ++r) {
    const float* const weights = task.scores + r * task.score_stride + first_key;
    for (int64_t c = column; c < end; c += kPanelWidth) {
      WeighHeadBlock<1, kVecsPerPanel, true>(task, weights, values, c,
                                             task.output + r * task.out_stride + c);
    }
  }
}

// The rows of a tile's group that there are, a block at a time.
template <typename Body>
inline void ForBlocks(const HeadTask& task, const HeadTile& tile, int64_t group, Body body) {
  const int64_t first = tile.first_row + group * cpu::kStandardGroupRows;
  for (int64_t row = first; row < first + cpu::kStandardGroupRows; row += kBlockRows) {
    const int64_t left = task.sequence.q_len - row;
    if (left > 0) body(left < kBlockRows ? left : kBlockRows, row);
  }
}

// Panels outermost, so that they stay in the first-level cache while the tile's rows meet them.
inline bool ScoreHeadTile(const HeadTask& task, const HeadStep& step, const HeadTile& tile) {
  for (int64_t key = 0; key < step.count; key += kColumnsAtOnce) {
    if (IsCancelled(task.cancelled)) return false;
    for (int64_t group = 0; group < tile.groups; ++group) {
      const KeyRange keys = {Clamp(tile.keys[group].begin, key, key + kColumnsAtOnce),
                             Clamp(tile.keys[group].end, key, key + kColumnsAtOnce)};
      if (keys.begin >= keys.end) continue;
      ForBlocks(task, tile, group, [&](int64_t rows, int64_t row) {
        ScoreHeadRows<kBlockRows>(task, rows, row, step, keys);
      });
    }
  }
  return true;
}

// Asks for a block's weights of the step: rows lie far apart, and the first panel of columns would
// wait for every one of them.
inline void FetchWeights(const HeadTask& task, int64_t row, const HeadStep& step,
                         const KeyRange& keys) {
  for (int64_t r = row; r < row + kBlockRows && r < task.sequence.q_len; ++r) {
    const float* const weights = task.scores + r * task.score_stride + step.first;
    for (int64_t key = keys.begin; key < keys.end; key += kPanelWidth) {
      __builtin_prefetch(weights + key);
    }
  }
}

inline bool WeighHeadTile(const HeadTask& task, const HeadStep& step, const HeadTile& tile,
                          bool finite, StepValues* values) {
  for (int64_t column = 0; column < values->columns; column += kColumnsAtOnce) {
    if (IsCancelled(task.cancelled)) return false;
    for (int64_t group = 0; group < tile.groups; ++group) {
      values->begin = tile.keys[group].begin;
      values->end = tile.keys[group].end;
      if (values->begin >= values->end) continue;
      ForBlocks(task, tile, group, [&](int64_t rows, int64_t row) {
        if (column == 0) FetchWeights(task, row + kBlockRows, step, tile.keys[group]);
        if (finite) {
          WeighHeadRows<kBlockRows>(task, rows, row, step.first, *values, column);
        } else {
          WeighHeadRowsCarefully(task, rows, row, step.first, *values, column);
        }
      });
    }
  }
  return true;
}

// One of the two products, a step of keys or values after another; those that nobody sees are not
// packed.
inline bool MultiplyHead(const HeadTask& task, Product product) {
  typedef Widened<ElementType::kFloat32> A;
  StepValues values = {};
  values.columns = task.out_stride;
  for (int64_t i = 0; i < cpu::kStandardStepPages; ++i) {
    values.pages[i] = reinterpret_cast<const char*>(task.step + i * kPageTokens * values.columns);
  }
  const int64_t kv_len = task.sequence.kv_len;
  for (HeadStep step = {0, 0}; step.first < kv_len; step.first += kStepKeys) {
    step.count = kv_len - step.first < kStepKeys ? kv_len - step.first : kStepKeys;
    bool packed = false;
    bool finite = true;
    for (HeadTile tile = {}; tile.first_row < task.sequence.q_len;
         tile.first_row += kTileGroups * cpu::kStandardGroupRows) {
      if (IsCancelled(task.cancelled)) return false;
      if (!TakeTile(task, step, product, &tile)) continue;
      if (!packed) {
        PackStep(task, step, product);
        if (product == Product::kValues) finite = AreFinite<A>(values, 0, step.count);
        packed = true;
      }
      const bool done = product == Product::kScores
                            ? ScoreHeadTile(task, step, tile)
                            : WeighHeadTile(task, step, tile, finite, &values);
      if (!done) return false;
    }
  }
  return true;
}
