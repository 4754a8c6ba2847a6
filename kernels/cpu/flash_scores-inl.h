// The first half of a flash tile: a task's rows and the pages of a step, which columns a row sees,
// and the scores of a tile against a page. Included after flash_softmax-inl.h and
// page_packing-inl.h. `A` is the arithmetic (flash_tile-inl.h): the type of the pages, and how they
// are multiplied.

// With so few blocks of rows pages are read from front to back, and what follows in memory is
// fetched ahead: the time goes into memory.
constexpr int64_t kFewBlocks = 2;
constexpr int64_t kMaxTileBlocks = 32;

// The keys that any row of a block sees, and those that all of them see.
struct BlockRanges {
  KeyRange any;
  KeyRange all;
  bool started;  // its rows have an output of this segment
};

template <class A>
struct FlashRun {
  const AttentionArgs& args;
  const cpu::FlashPlan& plan;
  const cpu::FlashTask& task;
  const Sequence& sequence;
  const bool* cancelled;
  cpu::FlashCounters* counters;
  PageLayout layout;  // of the pages that are multiplied
  int64_t group;      // query heads of a KV head
  int64_t out_stride;
  int64_t query_groups;  // of dimensions
  char* query;
  float* scores;
  float* output;
  float* total;
  float* product;
  RowState* states;
  RowState* totals;
  KeyRange* ranges;
  BlockRanges* block_ranges;
  char* packed;
  bool packs;           // keys and values are plain rows: a step's pages are made first
  bool transforms;      // scores need more than a factor
  const int32_t* list;  // pages, ascending; null: all of them, one after the other

  int64_t query_block_bytes() const {
    const int64_t scales = kScalesRows<A> ? kBlockRows * 4 : 0;
    return query_groups * A::kDepth * kBlockRows * A::kOperandBytes + scales;
  }
  int64_t position_of(int64_t row) const { return (task.first_row + row) / group; }
  int64_t head_of(int64_t row) const {
    return task.kv_head * group + (task.first_row + row) % group;
  }
};

// The pages of one step: up to kFlashStepPages, in ascending order.
struct Step {
  int64_t num_pages;
  int64_t pages[cpu::kFlashStepPages];  // of the sequence
  const char* keys[cpu::kFlashStepPages];
  const char* values[cpu::kFlashStepPages];
  const char* next;  // the page behind them; null: unknown
};

// The columns of a step that any row of a block sees, and those that all of them see.
struct BlockColumns {
  int64_t begin;
  int64_t end;
  int64_t common_begin;
  int64_t common_end;
};

inline int64_t Clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// The first column of the step whose key is not before `key`.
inline int64_t ColumnOf(const Step& step, int64_t key) {
  int64_t column = 0;
  for (int64_t i = 0; i < step.num_pages; ++i) {
    column += Clamp(key - step.pages[i] * kPageTokens, 0, kPageTokens);
  }
  return column;
}

inline VisibleColumns ColumnsOfRange(const Step& step, const KeyRange& keys) {
  VisibleColumns columns = {0, 0, ColumnOf(step, keys.begin), ColumnOf(step, keys.end)};
  if (columns.end <= columns.begin) columns.begin = columns.end = 0;
  return columns;
}

inline BlockColumns ColumnsOfBlock(const Step& step, const BlockRanges& ranges, bool masked) {
  const VisibleColumns any = ColumnsOfRange(step, ranges.any);
  const VisibleColumns all = ColumnsOfRange(step, ranges.all);
  BlockColumns block = {any.begin, any.end, all.begin, all.end};
  if (masked) block.common_begin = block.common_end = 0;
  return block;
}

template <class A, ElementType kType>
void PackQueriesFrom(const FlashRun<A>& run) {
  typedef typename Elements<kType>::Type Element;
  const int64_t padded = run.query_groups * A::kDepth;
  for (int64_t first = 0; first < run.task.num_rows; first += kBlockRows) {
    char* const block = run.query + first / kBlockRows * run.query_block_bytes();
    // Rows side by side, so that what is written is written from front to back. Missing ones repeat
    // the last: nobody looks at their scores.
    const Element* rows[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r) {
      const int64_t row = first + r < run.task.num_rows ? first + r : run.task.num_rows - 1;
      rows[r] = RowOf<kType>(run.sequence.query, run.position_of(row), run.head_of(row));
    }
    if constexpr (kScalesRows<A>) {
      for (int64_t r = 0; r < kBlockRows && first + r < run.task.num_rows; ++r) {
        A::template PackRow<kType>(rows[r], run.args.head_dim, padded, r, block);
      }
      continue;
    }
    int64_t done = 0;
    if constexpr (kInterleavesFloats<A>) {
      for (; done + kLanes <= run.args.head_dim; done += kLanes) {
        VecF lanes[kBlockRows];
        for (int r = 0; r < kBlockRows; ++r) lanes[r] = Elements<kType>::LoadVec(rows[r] + done);
        for (int i = 0; i < kLanes; i += 4) {
          Quad quads[kBlockRows];
          for (int r = 0; r < kBlockRows; ++r) {
            __builtin_memcpy(&quads[r], reinterpret_cast<const char*>(&lanes[r]) + i * 4, 16);
          }
          InterleaveQuads(quads, reinterpret_cast<float*>(block) + (done + i) * kBlockRows);
        }
      }
    }
    for (int64_t d = done; d < run.args.head_dim; ++d) {
      for (int r = 0; r < kBlockRows; ++r) {
        A::SetQuery(block, d, r, Elements<kType>::LoadOne(rows[r] + d));
      }
    }
    for (int64_t d = run.args.head_dim; d < padded; ++d) {
      for (int r = 0; r < kBlockRows; ++r) A::SetQuery(block, d, r, 0.0f);
    }
  }
}

template <class A>
void PackQueries(const FlashRun<A>& run) {
  switch (run.args.dtype) {
    case ElementType::kFloat32:
      return PackQueriesFrom<A, ElementType::kFloat32>(run);
    case ElementType::kFloat16:
      return PackQueriesFrom<A, ElementType::kFloat16>(run);
    case ElementType::kBFloat16:
      return PackQueriesFrom<A, ElementType::kBFloat16>(run);
    case ElementType::kInt8:
      return;
  }
}

// The keys of a page, and how far behind them lies what comes next in memory.
struct PageKeys {
  const char* keys;
  int64_t fetch;
};

// Scores of kM rows against the panels of one page that hold columns of [begin, end).
template <class A, int kM>
void ScorePage(const FlashRun<A>& run, const char* query, const PageKeys& page, int64_t begin,
               int64_t end, float* scores) {
  constexpr int kN = VecsFor(kM);
  constexpr int64_t kWidth = kN * kLanes;
  constexpr int64_t kBytes = A::P::kBytes;
  const int64_t panel_bytes = run.layout.key_panel() * run.layout.item_size();
  for (int64_t column = begin / kWidth * kWidth; column < end; column += kWidth) {
    const char* const from =
        page.keys + column / kPanelWidth * panel_bytes + column % kPanelWidth * kBytes;
    A::template Score<kM, kN>(query, from, from + page.fetch, run.query_groups, panel_bytes,
                              scores + column);
    run.counters->score_pairs += kM * kWidth;
  }
}

template <class A>
void ScoreRows(const FlashRun<A>& run, int64_t rows, const char* query, const PageKeys& page,
               int64_t begin, int64_t end, float* scores) {
  switch (rows) {
    case 1:
      return ScorePage<A, 1>(run, query, page, begin, end, scores);
    case 2:
      return ScorePage<A, 2>(run, query, page, begin, end, scores);
    case 3:
      return ScorePage<A, 3>(run, query, page, begin, end, scores);
    case 4:
      return ScorePage<A, 4>(run, query, page, begin, end, scores);
    case 5:
      if constexpr (kBlockRows > 4) {
        return ScorePage<A, 5>(run, query, page, begin, end, scores);
      }
      return;
    default:
      if constexpr (kBlockRows > 4) {
        return ScorePage<A, 6>(run, query, page, begin, end, scores);
      }
  }
}

// One tile: rows [row, row + count) of the task against one step.
template <class A>
struct Tile {
  const FlashRun<A>& run;
  const Step& step;
  int64_t row;
  int64_t count;
  int64_t blocks;
  BlockColumns columns[kMaxTileBlocks];

  int64_t rows_of(int64_t block) const {
    const int64_t left = count - block * kBlockRows;
    return left < kBlockRows ? left : kBlockRows;
  }
  const char* query_of(int64_t block) const {
    return run.query + (row / kBlockRows + block) * run.query_block_bytes();
  }
  float* scores_of(int64_t block) const { return run.scores + block * kBlockRows * kStepStride; }
  bool& started(int64_t block) const { return run.block_ranges[row / kBlockRows + block].started; }
  float* output_of(int64_t block) const {
    return run.output + (row + block * kBlockRows) * run.out_stride;
  }
  float* product_of(int64_t block) const {
    return run.product + block * kBlockRows * run.out_stride;
  }
};

// How far behind `offset` lies what is to be fetched while it is used: kAhead bytes in a stream
// that goes on at `next` after `bytes` bytes (null: it ends).
constexpr int64_t kAhead = 8192;
inline int64_t FetchDistance(const char* from, int64_t bytes, const char* next, int64_t offset) {
  if (offset + kAhead < bytes) return kAhead;
  return next == nullptr ? 0 : next - from + kAhead - bytes;
}

template <class A>
void ScorePageOfTile(const Tile<A>& tile, int64_t page) {
  const FlashRun<A>& run = tile.run;
  const Step& step = tile.step;
  const char* const keys = step.keys[page];
  const char* const next = page + 1 < step.num_pages ? step.keys[page + 1] : step.values[0];
  const bool few = tile.blocks <= kFewBlocks;
  // Panels outermost, so that they stay in the first-level cache while all rows meet them.
  constexpr int64_t kFull = kBlockVecs * kLanes;
  constexpr int64_t kWidth = kFull > kPanelWidth ? kFull : kPanelWidth;
  for (int64_t panel = 0; panel < kPageTokens; panel += kWidth) {
    const int64_t bytes = run.layout.KeyScale(0);
    const int64_t offset = panel * bytes / kPageTokens;
    if constexpr (A::kPageType == ElementType::kInt8) {
      // Both are read between the scores and the values, from all of the step's pages.
      for (int64_t t = panel; t < panel + kWidth && few; t += kPanelWidth) {
        __builtin_prefetch(keys + run.layout.KeyScale(t));
        __builtin_prefetch(step.values[page] + run.layout.ValueScale(t));
      }
    }
    const PageKeys from = {keys, few ? FetchDistance(keys, bytes, next, offset) : 0};
    for (int64_t block = 0; block < tile.blocks; ++block) {
      const BlockColumns& columns = tile.columns[block];
      const int64_t begin = Clamp(columns.begin - page * kPageTokens, panel, panel + kWidth);
      const int64_t end = Clamp(columns.end - page * kPageTokens, panel, panel + kWidth);
      if (begin >= end) continue;
      ScoreRows(run, tile.rows_of(block), tile.query_of(block), from, begin, end,
                tile.scores_of(block) + page * kPageTokens);
    }
  }
}

// row[j] of the columns that the row sees: the scales of an int8 cache, soft cap, biases, masks.
template <class A>
void TransformScores(const FlashRun<A>& run, const Step& step, int64_t row,
                     const VisibleColumns& columns, float* scores) {
  const AttentionArgs& args = run.args;
  if constexpr (A::kPageType == ElementType::kInt8) {
    for (int64_t j = columns.first; j < columns.last; j += kLanes) {
      const int64_t page = j / kPageTokens;
      const auto* const scales =
          reinterpret_cast<const float*>(step.keys[page] + run.layout.KeyScale(0));
      Store(Load(scores + j) * Load(scales + j - page * kPageTokens), scores + j);
    }
  }
  if (!run.transforms) return;
  const bool caps = args.soft_cap > 0.0f;
  for (int64_t j = columns.first; j < columns.last; j += kLanes) {
    VecF score = Load(scores + j) * args.scale;
    if (caps) score = Tanh(score / args.soft_cap) * args.soft_cap;
    Store(score, scores + j);
  }
  const int64_t head = run.head_of(row);
  for (int64_t i = columns.begin / kPageTokens; i * kPageTokens < columns.end; ++i) {
    const int64_t begin = Clamp(columns.begin, i * kPageTokens, (i + 1) * kPageTokens);
    const int64_t end = Clamp(columns.end, i * kPageTokens, (i + 1) * kPageTokens);
    const int64_t first = (step.pages[i] - i) * kPageTokens;
    const KeyRange keys = {first + begin, first + end};
    AddAlibi(args, run.sequence, head, run.position_of(row), keys, scores + begin);
    AddMask(args, run.sequence, head, run.position_of(row), keys, scores + begin);
  }
}
