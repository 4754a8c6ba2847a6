// One flash task's memory, and the pages it walks over: those of a cache where they lie, or plain
// rows packed into scratch memory. Included after flash_values-inl.h.

template <class A>
FlashRun<A> MakeRun(const AttentionArgs& args, const cpu::FlashPlan& plan,
                    const cpu::FlashTask& task, const cpu::FlashScratch& parts, char* scratch,
                    const bool* cancelled, cpu::FlashCounters* counters) {
  const int64_t depth = A::kDepth;
  KeyRange* const ranges = reinterpret_cast<KeyRange*>(scratch + parts.ranges);
  RowState* const states = reinterpret_cast<RowState*>(scratch + parts.states);
  return {args,
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
          states,
          states + plan.max_rows,
          ranges,
          reinterpret_cast<BlockRanges*>(ranges + plan.max_rows),
          scratch + parts.pages,
          !args.paged,
          TransformsScores(args),
          nullptr};
}

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
const char* PageAt(const FlashRun<A>& run, int64_t page) {
  const PageTable& pages = run.sequence.pages;
  return static_cast<const char*>(pages.blocks[page]) + run.task.kv_head * pages.head_stride;
}
