// The text of flash_attention.h: a task walks over its keys segment by segment and step by step;
// within a step, over its rows a tile at a time. Included after flash_values-inl.h.

// Tokens of the sequence [first, first + 64) of one KV head, which lie in any number of spans.
template <class A, typename Pack>
void VisitTokens(const FlashRun<A>& run, int64_t first, Pack pack) {
  const int64_t end =
      first + kPageTokens < run.sequence.kv_len ? first + kPageTokens : run.sequence.kv_len;
  int64_t span_first = 0;
  for (int64_t s = 0; s < run.sequence.num_spans && span_first < end; ++s) {
    const KeyValueSpan& span = run.sequence.spans[s];
    const int64_t from = first > span_first ? first : span_first;
    const int64_t to = end < span_first + span.length ? end : span_first + span.length;
    if (from < to) pack(span, from - span_first, cpu::PageRange{from - first, to - from});
    span_first += span.length;
  }
}

template <class A>
cpu::TokenRows RowsAt(const FlashRun<A>& run, const KeyValueSpan& span, int64_t token) {
  const int64_t item = run.args.kv_dtype == ElementType::kFloat32 ? 4 : 2;
  const auto at = [&](const RowsView& rows) {
    return static_cast<const char*>(rows.data) +
           (token * rows.row_stride + run.task.kv_head * rows.head_stride) * item;
  };
  return {run.args.kv_dtype, at(span.key), at(span.value), span.key.row_stride,
          span.value.row_stride};
}

// Tokens beyond the end are zeros, so that they need no care.
template <class A>
void PackKeys(const FlashRun<A>& run, int64_t page, char* to) {
  const int64_t first = page * kPageTokens;
  if (first + kPageTokens > run.sequence.kv_len) {
    __builtin_memset(to, 0, static_cast<size_t>(run.layout.value_offset()));
  }
  VisitTokens(run, first, [&](const KeyValueSpan& span, int64_t token, cpu::PageRange range) {
    PackKeysOfPage(run.layout, RowsAt(run, span, token), range, to);
  });
}

template <class A>
void PackValues(const FlashRun<A>& run, int64_t page, char* to) {
  const int64_t first = page * kPageTokens;
  if (first + kPageTokens > run.sequence.kv_len) {
    __builtin_memset(to, 0,
                     static_cast<size_t>(run.layout.page_bytes() - run.layout.value_offset()));
  }
  VisitTokens(run, first, [&](const KeyValueSpan& span, int64_t token, cpu::PageRange range) {
    PackValuesOfPage(run.layout, RowsAt(run, span, token), range, to);
  });
}

template <class A>
Tile<A> MakeTile(const FlashRun<A>& run, const Step& step, int64_t row) {
  const int64_t left = run.task.num_rows - row;
  const int64_t count = left < run.plan.tile_rows ? left : run.plan.tile_rows;
  Tile<A> tile = {run, step, row, count, (count + kBlockRows - 1) / kBlockRows, {}};
  for (int64_t block = 0; block < tile.blocks; ++block) {
    tile.columns[block] = ColumnsOfBlock(run, step, row + block * kBlockRows, tile.rows_of(block));
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
    if (run.packs && run.plan.tight) PackKeys(run, step.first_page + page, run.packed);
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
    if (run.packs && run.plan.tight) PackValues(run, step.first_page + page, run.packed);
    ValuesOfPage(tile, page, started, &values);
  }
  for (int64_t block = 0; block < tile.blocks; ++block) {
    if (started[block]) AddProduct(tile, block);
  }
  return true;
}

// The pages [first_page, end_page) of the sequence.
template <class A>
bool RunStep(const FlashRun<A>& run, int64_t first_page, int64_t end_page) {
  Step step = {first_page, end_page - first_page, {}, {}, nullptr};
  const int64_t keys_bytes = run.layout.value_offset();
  for (int64_t i = 0; i < step.num_pages; ++i) {
    const int64_t page = first_page + i;
    if (!run.packs) {
      const PageTable& pages = run.sequence.pages;
      step.keys[i] =
          static_cast<const char*>(pages.blocks[page]) + run.task.kv_head * pages.head_stride;
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
  if (!run.packs && (end_page + 0) * kPageTokens < run.sequence.kv_len) {
    step.next = static_cast<const char*>(run.sequence.pages.blocks[end_page]) +
                run.task.kv_head * run.sequence.pages.head_stride;
  }
  for (int64_t row = 0; row < run.task.num_rows; row += run.plan.tile_rows) {
    const Tile<A> tile = MakeTile(run, step, row);
    if (SeesAny(tile) && !RunTile(tile)) return false;
  }
  return true;
}

// The keys that any row of the task sees; each row's are remembered.
template <class A>
KeyRange SetRanges(const FlashRun<A>& run) {
  KeyRange all;
  for (int64_t row = 0; row < run.task.num_rows; ++row) {
    const KeyRange keys = VisibleKeys(run.args, run.sequence, run.position_of(row));
    run.ranges[row] = keys;
    if (keys.end == 0) continue;
    if (all.end == 0 || keys.begin < all.begin) all.begin = keys.begin;
    if (keys.end > all.end) all.end = keys.end;
  }
  return all;
}

// Keys of segment `segment`, a step at a time. False: cancelled.
template <class A>
bool RunSegment(const FlashRun<A>& run, const KeyRange& keys, int64_t segment) {
  for (int64_t row = 0; row < run.task.num_rows; ++row) run.states[row] = EmptyRow();
  __builtin_memset(run.output, 0, static_cast<size_t>(run.task.num_rows * run.out_stride) * 4);
  const int64_t first_page = keys.begin / kPageTokens;
  const int64_t end_page = (keys.end + kPageTokens - 1) / kPageTokens;
  const int64_t segment_end = (segment + 1) * cpu::kFlashSegmentPages;
  for (int64_t page = segment * cpu::kFlashSegmentPages; page < segment_end;
       page += cpu::kFlashStepPages) {
    const int64_t from = page > first_page ? page : first_page;
    const int64_t step_end = page + cpu::kFlashStepPages;
    const int64_t to = step_end < end_page ? step_end : end_page;
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
    float reference = state.reference;
    if (sink != -kInfinity) {
      if (sink * kLog2E > reference) reference = sink * kLog2E;
      scale = Exp2One(state.reference - reference);
      sum = sum * scale + Exp2One(sink * kLog2E - reference);
    }
    factor = scale / sum;
    lse = reference * kLn2 + __builtin_logf(sum);
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
      MergeRow(run.states[row], output, run.out_stride, run.totals + row,
               run.total + row * run.out_stride);
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
  const cpu::FlashScratch parts = cpu::DivideFlashScratch(
      args, {plan.max_rows, plan.tile_rows, plan.merges_inside, !args.paged, plan.tight});
  const int64_t depth = A::kDepth;
  const FlashRun<A> run = {args,
                           plan,
                           task,
                           args.sequences[task.sequence],
                           cancelled,
                           counters,
                           {A::kPageType, args.head_dim, args.value_dim},
                           args.num_heads / args.num_kv_heads,
                           cpu::FlashOutputStride(args.value_dim),
                           (args.head_dim + depth - 1) / depth,
                           scratch + parts.query,
                           reinterpret_cast<float*>(scratch + parts.scores),
                           reinterpret_cast<float*>(scratch + parts.output),
                           reinterpret_cast<float*>(scratch + parts.total),
                           reinterpret_cast<float*>(scratch + parts.product),
                           reinterpret_cast<RowState*>(scratch + parts.states),
                           reinterpret_cast<RowState*>(scratch + parts.states) + plan.max_rows,
                           reinterpret_cast<KeyRange*>(scratch + parts.ranges),
                           scratch + parts.pages,
                           !args.paged,
                           args.soft_cap > 0.0f || args.alibi_slopes != nullptr ||
                               args.mask.type != MaskType::kNone || !(args.scale > 0.0f)};
  PackQueries(run);
  const KeyRange keys = SetRanges(run);
  const bool merges = task.partial < 0 && plan.merges_inside;
  RowState* const states = merges ? run.totals : run.states;
  for (int64_t row = 0; row < task.num_rows; ++row) states[row] = EmptyRow();
  for (int64_t segment = task.first_segment; segment < task.end_segment; ++segment) {
    if (!RunSegment(run, keys, segment)) return;
    KeepSegment(run, segment, partials);
  }
  if (task.partial >= 0) return;
  float* const output = merges ? run.total : run.output;
  for (int64_t row = 0; row < task.num_rows; ++row) {
    FinishRow(args, task, row, states[row], output + row * run.out_stride);
  }
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
      return RunFlash<Widened<ElementType::kInt8>>(args, plan, task, scratch, partials, cancelled,
                                                   counters);
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
      MergeRow(other, more, stride, &state, output);
    }
    FinishRow(args, task, row, state, output);
  }
}
