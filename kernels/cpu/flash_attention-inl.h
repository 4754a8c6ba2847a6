// The text of flash_attention.h: a task walks over its keys segment by segment and step by step;
// within a step, over its rows a tile at a time. Included after flash_sparse-inl.h.

template <class A>
Tile<A> MakeTile(const FlashRun<A>& run, const Step& step, int64_t row) {
  const int64_t left = run.task.num_rows - row;
  const int64_t count = left < run.plan.tile_rows ? left : run.plan.tile_rows;
  Tile<A> tile = {run, step, row, count, (count + kBlockRows - 1) / kBlockRows, {}};
  const bool masked = run.args.mask.type != MaskType::kNone;
  for (int64_t block = 0; block < tile.blocks; ++block) {
    tile.columns[block] = ColumnsOfBlock(step, run.block_ranges[row / kBlockRows + block], masked);
  }
  return tile;
}

template <class A>
bool SeesAny(const Tile<A>& tile) {
  for (int64_t block = 0; block < tile.blocks; ++block) {
    if (tile.columns[block].end > 0) return true;
  }
  return false;
}

// False: cancelled.
template <class A>
bool RunTile(const Tile<A>& tile) {
  const FlashRun<A>& run = tile.run;
  const Step& step = tile.step;
  for (int64_t page = 0; page < step.num_pages; ++page) {
    if (IsCancelled(run.cancelled)) return false;
    if (run.packs && run.plan.tight) PackKeys(run, step.pages[page], run.packed);
    ScorePageOfTile(tile, page);
  }
  for (int64_t block = 0; block < tile.blocks; ++block) {
    WeighRowsOfBlock(tile, block);
    if (IsCancelled(run.cancelled)) return false;
  }
  StepValues values = {};
  values.columns = run.layout.padded_value_dim();
  for (int64_t page = 0; page < step.num_pages; ++page) values.pages[page] = step.values[page];
  if (tile.blocks > kFewBlocks && !run.plan.tight) return ValuesOfTile(tile, &values);

  bool started[kMaxTileBlocks] = {};
  for (int64_t page = 0; page < step.num_pages; ++page) {
    if (IsCancelled(run.cancelled)) return false;
    if (run.packs && run.plan.tight) PackValues(run, step.pages[page], run.packed);
    ValuesOfPage(tile, page, started, &values);
  }
  for (int64_t block = 0; block < tile.blocks; ++block) {
    if (started[block]) AddProduct(tile, block);
  }
  return true;
}

// The places [first, end) of the list, or pages of the sequence where there is none.
template <class A>
bool RunStep(const FlashRun<A>& run, int64_t first, int64_t end) {
  Step step = {end - first, {}, {}, {}, nullptr};
  const int64_t keys_bytes = run.layout.value_offset();
  for (int64_t i = 0; i < step.num_pages; ++i) {
    const int64_t page = run.list == nullptr ? first + i : run.list[first + i];
    step.pages[i] = page;
    if (!run.packs) {
      step.keys[i] = PageAt(run, page);
      step.values[i] = step.keys[i] + keys_bytes;
      continue;
    }
    char* const to = run.packed + (run.plan.tight ? 0 : i * run.layout.page_bytes());
    step.keys[i] = to;
    step.values[i] = run.plan.tight ? to : to + keys_bytes;
    if (run.plan.tight) continue;
    if (IsCancelled(run.cancelled)) return false;
    PackKeys(run, page, to);
    PackValues(run, page, to + keys_bytes);
  }
  if (!run.packs && run.list == nullptr && end * kPageTokens < run.sequence.kv_len) {
    step.next = PageAt(run, end);
  }
  for (int64_t row = 0; row < run.task.num_rows; row += run.plan.tile_rows) {
    const Tile<A> tile = MakeTile(run, step, row);
    if (SeesAny(tile) && !RunTile(tile)) return false;
  }
  return true;
}

inline void Widen(const KeyRange& keys, KeyRange* all) {
  if (keys.end == 0) return;
  if (all->end == 0 || keys.begin < all->begin) all->begin = keys.begin;
  if (keys.end > all->end) all->end = keys.end;
}

// The keys that any row of the task sees; each row's and each block's are remembered.
template <class A>
KeyRange SetRanges(const FlashRun<A>& run) {
  KeyRange all;
  for (int64_t row = 0; row < run.task.num_rows; ++row) {
    const KeyRange keys = VisibleKeys(run.args, run.sequence, run.position_of(row));
    run.ranges[row] = keys;
    BlockRanges& block = run.block_ranges[row / kBlockRows];
    if (row % kBlockRows == 0) block = {{0, 0}, keys, false};
    Widen(keys, &block.any);
    Widen(keys, &all);
    if (keys.begin > block.all.begin) block.all.begin = keys.begin;
    if (keys.end < block.all.end) block.all.end = keys.end;
    if (block.all.end < block.all.begin) block.all.end = block.all.begin = 0;
  }
  return all;
}

// A segment of the places [first, end) of the list, or of pages, a step at a time. False:
// cancelled.
template <class A>
bool RunSegment(const FlashRun<A>& run, int64_t first, int64_t end, int64_t segment) {
  for (int64_t row = 0; row < run.task.num_rows; ++row) run.states[row] = EmptyRow();
  for (int64_t row = 0; row < run.task.num_rows; row += kBlockRows) {
    run.block_ranges[row / kBlockRows].started = false;
  }
  const int64_t segment_end = (segment + 1) * cpu::kFlashSegmentPages;
  for (int64_t place = segment * cpu::kFlashSegmentPages; place < segment_end;
       place += cpu::kFlashStepPages) {
    const int64_t from = place > first ? place : first;
    const int64_t step_end = place + cpu::kFlashStepPages;
    const int64_t to = step_end < end ? step_end : end;
    if (from < to && !RunStep(run, from, to)) return false;
  }
  return true;
}

inline float* PartialOf(const AttentionArgs& args, const cpu::FlashTask& task, int64_t segment,
                        int64_t row, float* partials) {
  const int64_t index = task.partial + (segment - task.group_first_segment) * task.num_rows + row;
  return partials + index * cpu::FlashPartialStride(args.value_dim);
}

// Sums weights for the sink, divides, rounds and writes one row of the output, and its LSE.
inline void FinishRow(const AttentionArgs& args, const cpu::FlashTask& task, int64_t row,
                      RowState state, float* output) {
  const Sequence& sequence = args.sequences[task.sequence];
  const int64_t group = args.num_heads / args.num_kv_heads;
  const int64_t i = (task.first_row + row) / group;
  const int64_t head = task.kv_head * group + (task.first_row + row) % group;
  const float sink = args.sink_logits != nullptr ? args.sink_logits[head] : -kInfinity;
  float factor = 0.0f;
  float lse = sink;
  if (!(state.sum == 0.0f)) {
    float sum = state.sum;
    float scale = 1.0f;
    const float top = state.reference * ScoreFactor(args);
    float reference = top;
    if (sink != -kInfinity) {
      if (sink > reference) reference = sink;
      scale = Exp2One((top - reference) * kLog2E);
      sum = sum * scale + Exp2One((sink - reference) * kLog2E);
    }
    factor = scale / sum;
    if (sequence.lse != nullptr) lse = reference + __builtin_logf(sum);
  }
  const int64_t at = i * sequence.output.row_stride + head * sequence.output.head_stride;
  for (int64_t c = 0; c < args.value_dim; c += kLanes) {
    const int64_t left = args.value_dim - c;
    const VecF value = state.sum == 0.0f ? VecF{} : Load(output + c) * factor;
    StoreFirst(value, left < kLanes ? left : kLanes, args.output_dtype, sequence.output.data,
               at + c);
  }
  if (sequence.lse != nullptr) {
    sequence.lse[i * sequence.lse_row_stride + head * sequence.lse_head_stride] = lse;
  }
}

// What becomes of a finished segment: a partial result, the sum of those before it, or nothing yet.
template <class A>
void KeepSegment(const FlashRun<A>& run, int64_t segment, float* partials) {
  if (run.task.partial < 0 && !run.plan.merges_inside) return;
  for (int64_t row = 0; row < run.task.num_rows; ++row) {
    float* const output = run.output + row * run.out_stride;
    if (run.task.partial < 0) {
      MergeRow(run.states[row], output, run.out_stride, ScoreFactor(run.args) * kLog2E,
               run.totals + row, run.total + row * run.out_stride);
      continue;
    }
    float* const partial = PartialOf(run.args, run.task, segment, row, partials);
    __builtin_memcpy(partial, output, static_cast<size_t>(run.out_stride) * 4);
    __builtin_memcpy(partial + run.out_stride, run.states + row, sizeof(RowState));
  }
}

template <class A>
void RunFlash(const AttentionArgs& args, const cpu::FlashPlan& plan, const cpu::FlashTask& task,
              char* scratch, float* partials, const bool* cancelled, cpu::FlashCounters* counters) {
  const cpu::FlashScratch parts = cpu::DivideFlashScratch(args, cpu::ScratchShapeOf(args, plan));
  FlashRun<A> run = MakeRun<A>(args, plan, task, parts, scratch, cancelled, counters);
  PackQueries(run);
  const KeyRange keys = SetRanges(run);
  int64_t first = keys.begin / kPageTokens;
  int64_t end = (keys.end + kPageTokens - 1) / kPageTokens;
  int64_t first_segment = task.first_segment;
  int64_t end_segment = task.end_segment;
  if (plan.sparse) {
    first = first_segment = 0;
    end = ChoosePages(parts, scratch, &run);
    end_segment = (end + cpu::kFlashSegmentPages - 1) / cpu::kFlashSegmentPages;
  }
  const bool merges = task.partial < 0 && plan.merges_inside;
  RowState* const states = merges ? run.totals : run.states;
  for (int64_t row = 0; row < task.num_rows; ++row) states[row] = EmptyRow();
  for (int64_t segment = first_segment; segment < end_segment; ++segment) {
    if (!RunSegment(run, first, end, segment)) return;
    KeepSegment(run, segment, partials);
  }
  if (task.partial >= 0) return;
  float* const output = merges ? run.total : run.output;
  for (int64_t row = 0; row < task.num_rows; ++row) {
    FinishRow(args, task, row, states[row], output + row * run.out_stride);
  }
  if (plan.sparse && task.audited) AuditRow(run, keys, states);
}

inline void FlashAttentionTask(const AttentionArgs& args, const cpu::FlashPlan& plan,
                               const cpu::FlashTask& task, void* memory, float* partials,
                               const bool* cancelled, cpu::FlashCounters* counters) {
  char* const scratch = static_cast<char*>(memory);
#ifdef ATTN_NATIVE_BF16
  if (args.kv_dtype == ElementType::kBFloat16 && args.dtype == ElementType::kBFloat16) {
    return RunFlash<NativeBFloat16>(args, plan, task, scratch, partials, cancelled, counters);
  }
#endif
  if (!args.paged || args.kv_dtype == ElementType::kFloat32) {
    return RunFlash<Widened<ElementType::kFloat32>>(args, plan, task, scratch, partials, cancelled,
                                                    counters);
  }
  switch (args.kv_dtype) {
    case ElementType::kFloat32:
      return;
    case ElementType::kFloat16:
      return RunFlash<Widened<ElementType::kFloat16>>(args, plan, task, scratch, partials,
                                                      cancelled, counters);
    case ElementType::kBFloat16:
      return RunFlash<Widened<ElementType::kBFloat16>>(args, plan, task, scratch, partials,
                                                       cancelled, counters);
    case ElementType::kInt8:
      return RunFlash<ProductsOfInt8>(args, plan, task, scratch, partials, cancelled, counters);
  }
}

// Merges the partial results of a group's rows, in the order of their segments.
inline void MergeFlash(const AttentionArgs& args, const cpu::FlashTask& task, float* partials) {
  const int64_t stride = cpu::FlashOutputStride(args.value_dim);
  for (int64_t row = 0; row < task.num_rows; ++row) {
    float* const output = PartialOf(args, task, task.group_first_segment, row, partials);
    RowState state;
    __builtin_memcpy(&state, output + stride, sizeof(state));
    for (int64_t segment = task.group_first_segment + 1; segment < task.group_end_segment;
         ++segment) {
      const float* const more = PartialOf(args, task, segment, row, partials);
      RowState other;
      __builtin_memcpy(&other, more + stride, sizeof(other));
      MergeRow(other, more, stride, ScoreFactor(args) * kLog2E, &state, output);
    }
    FinishRow(args, task, row, state, output);
  }
}

// The pairs that exact tasks count, however they are cut: blocks of rows lie at multiples of
// kBlockRows, and take whole panels of keys and whole groups of values.
template <class A>
cpu::FlashCounters CountPairsOf(const AttentionArgs& args) {
  cpu::FlashCounters counters;
  const int64_t group = args.num_heads / args.num_kv_heads;
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    const Sequence& sequence = args.sequences[s];
    const int64_t rows = sequence.q_len * group;
    for (int64_t row = 0; row < rows; row += kBlockRows) {
      const int64_t count = rows - row < kBlockRows ? rows - row : kBlockRows;
      const KeyRange keys = VisibleToAny(args, sequence, row / group, (row + count - 1) / group);
      const int64_t width = VecsFor(static_cast<int>(count)) * kLanes;
      const int64_t depth = A::kDepth;
      counters.score_pairs +=
          count * (cpu::RoundUpTo(keys.end, width) - keys.begin / width * width);
      counters.value_pairs +=
          count * (cpu::RoundUpTo(keys.end, depth) - keys.begin / depth * depth);
    }
  }
  counters.score_pairs *= args.num_kv_heads;
  counters.value_pairs *= args.num_kv_heads;
  return counters;
}

inline cpu::FlashCounters CountFlashPairs(const AttentionArgs& args) {
  const bool native = args.kv_dtype == ElementType::kBFloat16 && args.dtype == args.kv_dtype;
#ifdef ATTN_NATIVE_BF16
  if (native) return CountPairsOf<NativeBFloat16>(args);
#endif
  (void)native;
  if (!args.paged) return CountPairsOf<Widened<ElementType::kFloat32>>(args);
  switch (args.kv_dtype) {
    case ElementType::kBFloat16:
      return CountPairsOf<Widened<ElementType::kBFloat16>>(args);
    case ElementType::kInt8:
      return CountPairsOf<ProductsOfInt8>(args);
    case ElementType::kFloat32:
    case ElementType::kFloat16:
      break;
  }
  return CountPairsOf<Widened<ElementType::kFloat32>>(args);
}

inline void SummarizeKeysOfTask(const AttentionArgs& args, const cpu::FlashPlan& plan,
                                const cpu::FlashSummaryTask& task, void* memory) {
  char* const scratch = static_cast<char*>(memory);
  if (!args.paged) {
    return SummarizePages<Widened<ElementType::kFloat32>>(args, plan, task, scratch);
  }
  switch (args.kv_dtype) {
    case ElementType::kFloat32:
      return SummarizePages<Widened<ElementType::kFloat32>>(args, plan, task, scratch);
    case ElementType::kFloat16:
      return SummarizePages<Widened<ElementType::kFloat16>>(args, plan, task, scratch);
    case ElementType::kBFloat16:
      return SummarizePages<Widened<ElementType::kBFloat16>>(args, plan, task, scratch);
    case ElementType::kInt8:
      return SummarizePages<Widened<ElementType::kInt8>>(args, plan, task, scratch);
  }
}
