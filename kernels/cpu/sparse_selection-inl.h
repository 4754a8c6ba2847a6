// The second half of the selection of sparse_selection.h: which pages are kept. Included after
// page_weights-inl.h.

// Heavier first; of equal ones the earlier.
inline bool Outweighs(const Selection& s, int32_t a, int32_t b) {
  if (s.estimates[a] != s.estimates[b]) return s.estimates[a] > s.estimates[b];
  return a < b;
}

inline void SiftDown(const Selection& s, int64_t at, int64_t size) {
  const int32_t page = s.heap[at];
  for (int64_t child = 2 * at + 1; child < size; child = 2 * at + 1) {
    if (child + 1 < size && Outweighs(s, s.heap[child + 1], s.heap[child])) ++child;
    if (!Outweighs(s, s.heap[child], page)) break;
    s.heap[at] = s.heap[child];
    at = child;
  }
  s.heap[at] = page;
}

inline bool AlwaysKept(const Selection& s, int64_t page) {
  const cpu::SelectionTask& task = s.task;
  const int64_t first = (s.first_page + page) * kPageTokens;
  const int64_t from = task.first_position + s.first_position;
  const int64_t to = from + s.positions - 1;
  return s.first_page + page < task.sink_pages ||
         (from - (first + kPageTokens - 1) <= task.local_keys && first - to <= task.local_keys);
}

// Marks the heaviest pages as kept until the target is reached.
inline void KeepHeaviest(const Selection& s, int64_t visible_pairs, cpu::SelectionResult* result) {
  const cpu::SelectionTask& task = s.task;
  const double budget = (1.0 - task.factor) * static_cast<double>(visible_pairs);
  double mass = 0.0;
  int64_t candidates = 0;
  for (int64_t p = 0; p < s.pages; ++p) {
    if (s.pairs[p] == 0) {
      s.kept[p] = 0;
    } else if (s.kept[p] != 0 || AlwaysKept(s, p)) {
      s.kept[p] = 1;
      result->kept_pairs += s.pairs[p];
      mass += static_cast<double>(s.estimates[p]);
    } else {
      s.heap[candidates++] = static_cast<int32_t>(p);
    }
  }
  for (int64_t i = candidates / 2; i-- > 0;) SiftDown(s, i, candidates);
  while (candidates > 0) {
    const int32_t page = s.heap[0];
    const double left = budget - static_cast<double>(result->kept_pairs);
    // The last page is kept where that comes nearer to the budget than leaving it out.
    if (task.mass > 0.0 ? mass >= task.mass : 2.0 * left < s.pairs[page]) break;
    s.kept[page] = 1;
    result->kept_pairs += s.pairs[page];
    mass += static_cast<double>(s.estimates[page]);
    s.heap[0] = s.heap[--candidates];
    SiftDown(s, 0, candidates);
  }
  result->estimated_mass = candidates == 0 || mass > 1.0 ? 1.0f : static_cast<float>(mass);
}

template <int kVectors>
inline cpu::SelectionResult SelectFrom(const cpu::SelectionTask& task, int32_t* pages,
                                       void* scratch) {
  cpu::SelectionResult result;
  if (task.rows == 0) return result;
  const Selection s = MakeSelection(task, scratch);
  const bool all = task.mass > 0.0 ? task.mass >= 1.0 : task.factor <= 0.0;
  PoolQueries(s, kVectors == 1);
  for (int64_t p = 0; p < s.pages; ++p) s.kept[p] = all ? 1 : 0;
  if (all) {
    for (int64_t p = 0; p < s.pages; ++p) {
      s.pairs[p] = static_cast<int32_t>(VisiblePairs(s, p));
      s.estimates[p] = 0.0f;
    }
  } else {
    WeighAllPages<kVectors>(s);
    NormaliseEstimates(s);
  }
  for (int64_t p = 0; p < s.pages; ++p) result.visible_pairs += s.pairs[p];
  KeepHeaviest(s, result.visible_pairs, &result);
  for (int64_t p = 0; p < s.pages; ++p) {
    if (s.kept[p] != 0) pages[result.pages++] = static_cast<int32_t>(s.first_page + p);
  }
  return result;
}

// Writes the selected pages (numbers in the sequence) in ascending order; room for all of
// SelectablePages. Scratch: SelectionScratchBytes, aligned to 64, uninitialised. Pages that no row
// sees are never selected, pages with keys that are not finite always.
inline cpu::SelectionResult SelectPages(const cpu::SelectionTask& task, int32_t* pages,
                                        void* scratch) {
  return SelectFrom<static_cast<int>(cpu::kSummaryVectors)>(task, pages, scratch);
}

// The same from bounds: for a few rows (decoding) over caches that keep no summaries. Their
// estimates rank pages, but overstate how unequal these are: the mass is no measure.
inline cpu::SelectionResult SelectPagesByBounds(const cpu::SelectionTask& task, int32_t* pages,
                                                void* scratch) {
  return SelectFrom<1>(task, pages, scratch);
}
