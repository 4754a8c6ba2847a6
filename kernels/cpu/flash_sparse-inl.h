// The sparse side of flash_attention-inl.h: summaries of keys, the list of pages that a task keeps,
// and the audit of one of its rows. Included after sparse_selection-inl.h and flash_pages-inl.h.

// Keys of one page as float32 [head_dim][64].
template <class A>
void WidenKeys(const PageLayout& layout, const char* page, float* wide) {
  typedef typename A::P P;
  const int64_t panel_bytes = layout.key_panel() * layout.item_size();
  for (int64_t t = 0; t < kPageTokens; t += kLanes) {
    VecF scales = Broadcast(1.0f);
    if (layout.has_scales())
      scales = Load(reinterpret_cast<const float*>(page + layout.KeyScale(t)));
    const char* const from = page + t / kPanelWidth * panel_bytes + t % kPanelWidth * P::kBytes;
    for (int64_t d = 0; d < layout.head_dim; ++d) {
      const VecF keys =
          P::Get(from + d / P::kDepth * kPanelWidth * P::kBytes, static_cast<int>(d % P::kDepth));
      Store(layout.has_scales() ? keys * scales : keys, wide + d * kPageTokens + t);
    }
  }
}

// Summaries of the task's pages. Scratch: a page of keys, and one of float32.
template <class A>
void SummarizePages(const AttentionArgs& args, const cpu::FlashPlan& plan,
                    const cpu::FlashSummaryTask& task, char* scratch) {
  cpu::FlashTask rows;
  rows.sequence = task.sequence;
  rows.kv_head = task.kv_head;
  cpu::FlashCounters counters;
  const cpu::FlashScratch parts = cpu::DivideFlashScratch(args, cpu::ScratchShapeOf(args, plan));
  const FlashRun<A> run = MakeRun<A>(args, plan, rows, parts, scratch, nullptr, &counters);
  const int64_t stride = cpu::SummaryFloats(args.head_dim);
  char* const keys = scratch;
  float* const wide =
      reinterpret_cast<float*>(scratch + cpu::RoundUpTo(run.layout.value_offset(), kPageAlignment));
  for (int64_t page = task.first_page; page < task.end_page; ++page) {
    const char* from = keys;
    if (run.packs) {
      PackKeys(run, page, keys);
    } else if (page * kPageTokens + kPageTokens <= run.sequence.pages.first_token) {
      continue;  // let go
    } else {
      from = PageAt(run, page);
    }
    WidenKeys<A>(run.layout, from, wide);
    const int64_t left = run.sequence.kv_len - page * kPageTokens;
    SummarizePage(wide, args.head_dim, left < kPageTokens ? left : kPageTokens,
                  plan.summaries + task.summary + page * stride);
  }
}

// Fills the run's list of pages and returns how many they are.
template <class A>
int64_t ChoosePages(const cpu::FlashScratch& parts, char* scratch, FlashRun<A>* run) {
  const AttentionArgs& args = run->args;
  float* const queries = reinterpret_cast<float*>(scratch + parts.selection);
  int32_t* const list = reinterpret_cast<int32_t*>(scratch + parts.list);
  for (int64_t row = 0; row < run->task.num_rows; ++row) {
    const char* const block = run->query + row / kBlockRows * run->query_block_bytes();
    for (int64_t d = 0; d < args.head_dim; ++d) {
      queries[row * args.head_dim + d] = A::GetQuery(block, d, static_cast<int>(row % kBlockRows));
    }
  }
  cpu::SelectionTask task;
  task.queries = queries;
  task.query_stride = args.head_dim;
  task.ranges = run->ranges;
  cpu::SetSelection(args, run->plan, run->task, &task);
  const int64_t own = parts.selection + cpu::RoundUpTo(run->plan.max_rows * args.head_dim * 4, 64);
  const cpu::SelectionResult result = SelectPages(task, list, scratch + own);
  run->counters->visible_pairs += result.visible_pairs;
  run->counters->kept_pairs += result.kept_pairs;
  run->list = list;
  return result.pages;
}

// One row against all keys that it sees: the share of its attention that the list kept.
template <class A>
void AuditRow(const FlashRun<A>& run, const KeyRange& keys, const RowState* kept) {
  // Any row, but the same one every time.
  const int64_t row =
      (run.task.first_row * 7919 + run.task.kv_head * 104729 + run.task.sequence * 1299709) %
      run.task.num_rows;
  if (run.ranges[row].end == 0) return;
  // The row's block alone, in the spare place, with the row first.
  char* const spare = run.query + cpu::RoundUpTo(run.plan.max_rows, kBlockRows) / kBlockRows *
                                      run.query_block_bytes();
  const char* const block = run.query + row / kBlockRows * run.query_block_bytes();
  if constexpr (kScalesRows<A>) A::SetScale(spare, 0, A::GetScale(block, row % kBlockRows));
  for (int64_t d = 0; d < run.query_groups * A::kDepth; ++d) {
    A::SetQuery(spare, d, 0, A::GetQuery(block, d, static_cast<int>(row % kBlockRows)));
  }
  RowState full = EmptyRow();
  const float factor = ScoreFactor(run.args) * kLog2E;
  const int64_t end = (keys.end + kPageTokens - 1) / kPageTokens;
  cpu::FlashCounters uncounted;
  FlashRun<A> audit = run;
  audit.counters = &uncounted;
  for (int64_t page = run.ranges[row].begin / kPageTokens; page < end; ++page) {
    if (IsCancelled(run.cancelled)) return;
    Step step = {1, {page}, {run.packed}, {}, nullptr};
    if (run.packs) {
      PackKeys(run, page, run.packed);
    } else {
      step.keys[0] = PageAt(run, page);
    }
    VisibleColumns columns = ColumnsOfRange(step, run.ranges[row]);
    if (columns.end == 0) break;
    columns.first = columns.begin / kLanes * kLanes;
    columns.last = cpu::RoundUpTo(columns.end, kLanes);
    ScorePage<A, 1>(audit, spare, {step.keys[0], 0}, columns.begin, columns.end, run.scores);
    TransformScores(audit, step, row, columns, run.scores);
    HideColumns(columns, run.scores);
    WeighScores<A>(columns.first, columns.last, factor, 1, run.scores, &full, nullptr, 0);
  }
  if (!(full.sum > 0.0f)) return;
  const float share =
      Exp2One((kept[row].reference - full.reference) * factor) * kept[row].sum / full.sum;
  run.counters->audited_rows += 1;
  run.counters->audited_mass += static_cast<double>(share < 1.0f ? share : 1.0f);
}
