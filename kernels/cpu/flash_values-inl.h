// The second half of a flash tile: its scores become weights, row by row, and the weights are
// multiplied with the values. Included after flash_scores-inl.h.

// Hidden weights are zero, whatever the scale of a token that a page does not hold.
template <class A>
void ScaleWeights(const FlashRun<A>& run, const Step& step, const VisibleColumns& columns,
                  float* weights) {
  VecI largest = {};  // bits of magnitudes: they order as integers do, NaNs above all numbers
  for (int64_t j = columns.first; j < columns.last; j += kLanes) {
    const int64_t page = j / kPageTokens;
    const auto* const scales =
        reinterpret_cast<const float*>(step.values[page] + run.layout.ValueScale(0));
    const VecF p = Load(weights + j);
    const VecF scaled = p * Load(scales + j - page * kPageTokens);
    const VecF weight = p == 0.0f ? p : scaled;
    const VecI bits = reinterpret_cast<VecI>(weight) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
    Store(weight, weights + j);
  }
  if constexpr (kScalesRows<A>) A::RoundWeights(columns.first, columns.last, largest, weights);
}

template <class A>
void WeighRowsOfBlock(const Tile<A>& tile, int64_t block) {
  const FlashRun<A>& run = tile.run;
  const BlockColumns& all = tile.columns[block];
  if (all.end == 0) return;
  const float factor = ScoreFactor(run.args) * kLog2E;
  VisibleColumns columns = {all.begin / kLanes * kLanes, cpu::RoundUpTo(all.end, kLanes), all.begin,
                            all.end};
  const bool same = all.begin == all.common_begin && all.end == all.common_end;
  const int64_t rows = tile.rows_of(block);
  const int64_t first_row = tile.row + block * kBlockRows;
  const bool hides = !same || all.begin > columns.first || all.end < columns.last;
  const bool transforms = run.transforms || A::kPageType == ElementType::kInt8;
  for (int64_t r = 0; r < rows && (hides || transforms); ++r) {
    float* const scores = tile.scores_of(block) + r * kStepStride;
    if (!same) {
      const VisibleColumns own = ColumnsOfRange(tile.step, run.ranges[first_row + r]);
      columns.begin = own.begin;
      columns.end = own.end;
    }
    if (transforms) TransformScores(run, tile.step, first_row + r, columns, scores);
    if (hides) HideColumns(columns, scores);
  }
  WeighScores<A>(columns.first, columns.last, factor, rows, tile.scores_of(block),
                 run.states + first_row, run.output + first_row * run.out_stride, run.out_stride);
  if constexpr (A::kPageType == ElementType::kInt8) {
    for (int64_t r = 0; r < rows; ++r) {
      ScaleWeights(run, tile.step, columns, tile.scores_of(block) + r * kStepStride);
    }
  }
}

// kM rows times columns [first, end) of the values, whole panels. `fetch`: how far behind them lies
// what comes next in memory.
template <class A, int kM>
void ValueRows(const StepValues& values, int64_t first, int64_t end, const char* weights,
               int64_t fetch, Add add, float* out, int64_t out_stride) {
  constexpr int kN = VecsFor(kM);
  int64_t column = first;
  for (; column + kN * kLanes <= end; column += kN * kLanes) {
    if constexpr (kScalesRows<A>) {
      A::template ValueBlock<kM, kN>(weights, values, column, fetch, add, out + column, out_stride);
    } else {
      ValueBlock<A, kM, kN>(weights, values, column, fetch, add, out + column, out_stride);
    }
  }
  if constexpr (kN > kVecsPerPanel) {
    for (; column < end; column += kPanelWidth) {
      if constexpr (kScalesRows<A>) {
        A::template ValueBlock<kM, kVecsPerPanel>(weights, values, column, fetch, add, out + column,
                                                  out_stride);
      } else {
        ValueBlock<A, kM, kVecsPerPanel>(weights, values, column, fetch, add, out + column,
                                         out_stride);
      }
    }
  }
}

template <class A>
void ValuesOfRows(int64_t rows, const StepValues& values, int64_t first, int64_t end,
                  const char* weights, int64_t fetch, Add add, float* out, int64_t out_stride) {
  switch (rows) {
    case 1:
      return ValueRows<A, 1>(values, first, end, weights, fetch, add, out, out_stride);
    case 2:
      return ValueRows<A, 2>(values, first, end, weights, fetch, add, out, out_stride);
    case 3:
      return ValueRows<A, 3>(values, first, end, weights, fetch, add, out, out_stride);
    case 4:
      return ValueRows<A, 4>(values, first, end, weights, fetch, add, out, out_stride);
    case 5:
      if constexpr (kBlockRows > 4) {
        return ValueRows<A, 5>(values, first, end, weights, fetch, add, out, out_stride);
      }
      return;
    default:
      if constexpr (kBlockRows > 4) {
        return ValueRows<A, 6>(values, first, end, weights, fetch, add, out, out_stride);
      }
  }
}

// Columns [begin, end) of the step are finite: then 0 * v is 0.
template <class A>
bool AreFinite(const StepValues& values, int64_t begin, int64_t end) {
  typedef typename A::P P;
  if constexpr (A::kPageType == ElementType::kInt8) return true;  // scales may not be: ScaleWeights
  for (int64_t at = begin / A::kDepth * A::kDepth; at < end; at += A::kDepth) {
    VecF zero = Broadcast(0.0f);
    for (int64_t c = 0; c < values.columns; c += kLanes) {
      const char* const from = ValuesAt<P>(values, at, c);
      for (int j = 0; j < A::kDepth; ++j) zero += P::Get(from, j) * 0.0f;
    }
    if (!(HorizontalSum(zero) == 0.0f)) return false;
  }
  return true;
}

// Whether hidden keys of the columns [begin, end) have values that are not finite, so that a weight
// of zero would not hide them.
template <class A>
bool NeedsCare(const StepValues& values, const BlockColumns& columns, int64_t begin, int64_t end) {
  const int64_t inner_begin = Clamp(columns.common_begin, begin, end);
  const int64_t inner_end = Clamp(columns.common_end, inner_begin, end);
  return !AreFinite<A>(values, begin, inner_begin) || !AreFinite<A>(values, inner_end, end);
}

// One row with the values of tokens that it does not see left out: product (+)= weights * values,
// in order. `masked`: a weight of zero may be a token that the mask hides.
template <class A>
void CarefulRow(const StepValues& values, const VisibleColumns& columns, bool masked,
                const char* weights, bool accumulate, float* product) {
  typedef typename A::P P;
  constexpr int kItem = P::kBytes / A::kDepth;
  for (int64_t c = 0; c < values.columns; c += kLanes) {
    VecF acc[1][1] = {};
    if (accumulate) acc[0][0] = Load(product + c);
    for (int64_t at = values.begin; at < values.end; at += A::kDepth) {
      const char* const from = ValuesAt<P>(values, at, c);
      char seen[kLanes * P::kBytes] = {};
      for (int j = 0; j < A::kDepth; ++j) {
        if (at + j < columns.begin || at + j >= columns.end) continue;
        if (masked && A::IsZero(weights + (at + j) * A::kOperandBytes)) continue;
        for (int i = 0; i < kLanes; ++i) {
          const int byte = i * P::kBytes + j * kItem;
          __builtin_memcpy(seen + byte, from + byte, kItem);
        }
      }
      A::template Weigh<1, 1>(weights + at * A::kOperandBytes, seen, seen, 1, acc);
    }
    Store(acc[0][0], product + c);
  }
}

// Groups of tokens of the step's columns [from, to) that a block takes.
template <class A>
inline void TakeColumns(const BlockColumns& columns, int64_t from, int64_t to, StepValues* values) {
  values->begin = Clamp(columns.begin, from, to) / A::kDepth * A::kDepth;
  values->end = cpu::RoundUpTo(Clamp(columns.end, from, to), A::kDepth);
}

// A block's rows with the tokens of values->begin to values->end, those that a row does not see
// left out, into the product.
template <class A>
void AddCarefully(const Tile<A>& tile, int64_t block, bool accumulate, const StepValues& values) {
  if constexpr (A::kPageType == ElementType::kInt8)
    return;  // AreFinite
  else {
    const char* const weights = reinterpret_cast<const char*>(tile.scores_of(block));
    const bool masked = tile.run.args.mask.type != MaskType::kNone;
    for (int64_t r = 0; r < tile.rows_of(block); ++r) {
      const int64_t row = tile.row + block * kBlockRows + r;
      CarefulRow<A>(values, ColumnsOfRange(tile.step, tile.run.ranges[row]), masked,
                    weights + r * kStepStride * 4, accumulate,
                    tile.product_of(block) + r * tile.run.out_stride);
    }
  }
}

// A segment's outputs are zeros before the first product is added.
template <class A>
void StartOutput(const Tile<A>& tile, int64_t block) {
  if (tile.started(block)) return;
  __builtin_memset(tile.output_of(block), 0,
                   static_cast<size_t>(tile.rows_of(block) * tile.run.out_stride) * 4);
  tile.started(block) = true;
}

template <class A>
void AddProduct(const Tile<A>& tile, int64_t block) {
  const int64_t count = tile.rows_of(block) * tile.run.out_stride;
  const float* const product = tile.product_of(block);
  float* const output = tile.output_of(block);
  StartOutput(tile, block);
  if constexpr (kScalesRows<A>) {
    for (int64_t r = 0; r < tile.rows_of(block); ++r) {
      const int64_t at = r * tile.run.out_stride;
      A::AddProduct(reinterpret_cast<const char*>(tile.scores_of(block) + r * kStepStride),
                    product + at, tile.run.out_stride, output + at);
    }
    return;
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    Store(Load(output + i) + Load(product + i), output + i);
  }
}

// The tokens of one page into the products; started[block]: it has one already.
template <class A>
void ValuesOfPage(const Tile<A>& tile, int64_t page, bool* started, StepValues* values) {
  const FlashRun<A>& run = tile.run;
  const Step& step = tile.step;
  const int64_t first = page * kPageTokens;
  bool skip[kMaxTileBlocks];
  for (int64_t block = 0; block < tile.blocks; ++block) {
    TakeColumns<A>(tile.columns[block], first, first + kPageTokens, values);
    skip[block] = values->begin >= values->end;
    if (skip[block]) continue;
    run.counters->value_pairs += tile.rows_of(block) * (values->end - values->begin);
    if (!NeedsCare<A>(*values, tile.columns[block], values->begin, values->end)) continue;
    AddCarefully(tile, block, started[block], *values);
    skip[block] = started[block] = true;
  }
  const char* const next = page + 1 < step.num_pages ? step.values[page + 1] : step.next;
  const int64_t bytes = run.layout.ValueScale(0);
  for (int64_t column = 0; column < values->columns; column += kPanelWidth) {
    const int64_t offset = column / kPanelWidth * ValuePanelBytes<typename A::P>();
    const int64_t fetch = run.packs ? 0 : FetchDistance(step.values[page], bytes, next, offset);
    for (int64_t block = 0; block < tile.blocks; ++block) {
      if (skip[block]) continue;
      TakeColumns<A>(tile.columns[block], first, first + kPageTokens, values);
      ValuesOfRows<A>(tile.rows_of(block), *values, column, column + kPanelWidth,
                      reinterpret_cast<const char*>(tile.scores_of(block)), fetch,
                      started[block] ? Add::kToSum : Add::kToZero, tile.product_of(block),
                      run.out_stride);
    }
  }
  for (int64_t block = 0; block < tile.blocks; ++block) started[block] |= !skip[block];
}

// All pages of the step; panels of columns outermost, so that one stays in the first-level cache
// while all rows meet it.
template <class A>
bool ValuesOfTile(const Tile<A>& tile, StepValues* values) {
  const FlashRun<A>& run = tile.run;
  bool careful[kMaxTileBlocks];
  for (int64_t block = 0; block < tile.blocks; ++block) {
    careful[block] = false;
    TakeColumns<A>(tile.columns[block], 0, kStepKeys, values);
    if (values->begin >= values->end) continue;
    run.counters->value_pairs += tile.rows_of(block) * (values->end - values->begin);
    careful[block] = NeedsCare<A>(*values, tile.columns[block], values->begin, values->end);
    // What is not scaled yet can't be stored where outputs are.
    if constexpr (kScalesRows<A>) StartOutput(tile, block);
    if (!careful[block]) continue;
    AddCarefully(tile, block, false, *values);
    AddProduct(tile, block);
  }
  constexpr int64_t kFull = kBlockVecs * kLanes;
  constexpr int64_t kWidth = kFull > kPanelWidth ? kFull : kPanelWidth;
  for (int64_t column = 0; column < values->columns; column += kWidth) {
    const int64_t panel_end = column + kWidth < values->columns ? column + kWidth : values->columns;
    for (int64_t block = 0; block < tile.blocks; ++block) {
      if (careful[block]) continue;
      TakeColumns<A>(tile.columns[block], 0, kStepKeys, values);
      if (values->begin >= values->end) continue;
      ValuesOfRows<A>(tile.rows_of(block), *values, column, panel_end,
                      reinterpret_cast<const char*>(tile.scores_of(block)), 0,
                      tile.started(block) ? Add::kToOutput : Add::kToZero, tile.output_of(block),
                      run.out_stride);
    }
    if (IsCancelled(run.cancelled)) return false;
  }
  for (int64_t block = 0; block < tile.blocks; ++block) {
    tile.started(block) |= tile.columns[block].end > 0;
  }
  return true;
}
