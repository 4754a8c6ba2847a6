// What share of the attention each page holds, estimated from summaries or bounds: the first half
// of the selection of sparse_selection.h. Included after math-inl.h and page_summary-inl.h.
//
// A page's weight for a lane (rows of one head, side by side, pooled to their mean q) is the sum
// over its summary's vectors of n exp(scale q . k): the softmax over all pages of each lane by
// itself, so that every lane has the same say, then the sum over lanes. Of what was compared (means
// of 8 to 64 keys, one softmax for all lanes, the greatest instead of the sum, antidiagonals,
// variances for each dimension), this recovers most at this cost: on long documents of 32,768
// tokens, 90 % left out, 0.993 of what the truly best pages hold, where means of 16 keys reach
// 0.987 and XAttention's antidiagonals (arXiv:2503.16428) at stride 8, ten times the work, 0.989.
// Work: 4 / (16 * 64) multiply-adds for each dimension of each (query, key) pair, 1/512 of
// attention's.

// A running selection. Arrays of lanes are [lanes].
struct Selection {
  const cpu::SelectionTask& task;
  int64_t first_page;
  int64_t pages;
  int64_t lanes;
  int64_t first_position;  // of the task's rows, in the sequence
  int64_t positions;
  KeyRange common;  // keys that every row sees
  float* pooled;
  float* query;
  float* rows;      // that see any key
  float* norm;      // of the pooled query, scaled
  float* position;  // mean, among the keys
  float* slope;
  float* visible;  // share of the page's pairs that its rows see
  float* inverse;
  int32_t* row_lanes;
  float* tops;
  float* sums;
  float* estimates;
  int32_t* pairs;
  int32_t* heap;
  uint8_t* kept;
};

inline Selection MakeSelection(const cpu::SelectionTask& task, void* scratch) {
  const KeyRange pages = cpu::SelectablePages(task);
  const int64_t count = pages.end - pages.begin;
  const int64_t first = task.first_row / task.group;
  const int64_t positions = (task.first_row + task.rows - 1) / task.group - first + 1;
  const int64_t lanes = cpu::SelectionLanes(positions, task.group, kLanes);
  const int64_t parts = lanes / task.group < positions ? lanes / task.group : positions;
  const cpu::SelectionScratch at =
      cpu::DivideSelectionScratch(task.rows, task.group, task.head_dim, count);
  char* const bytes = static_cast<char*>(scratch);
  const auto floats = [bytes](int64_t offset) { return reinterpret_cast<float*>(bytes + offset); };
  float* const numbers = floats(at.lanes);
  auto* const row_lanes = reinterpret_cast<int32_t*>(bytes + at.row_lanes);
  KeyRange common = {0, task.kv_len};
  for (int64_t i = 0; i < task.rows; ++i) {
    if (task.ranges[i].begin > common.begin) common.begin = task.ranges[i].begin;
    if (task.ranges[i].end < common.end) common.end = task.ranges[i].end;
    const int64_t index = task.first_row + i;
    const int64_t part = (index / task.group - first) * parts / positions;
    row_lanes[i] = static_cast<int32_t>(index % task.group * parts + part);
  }
  return {task,
          pages.begin,
          count,
          lanes,
          first,
          positions,
          common,
          floats(at.pooled),
          floats(at.query),
          numbers,
          numbers + lanes,
          numbers + 2 * lanes,
          numbers + 3 * lanes,
          numbers + 4 * lanes,
          numbers + 5 * lanes,
          row_lanes,
          floats(at.tops),
          floats(at.sums),
          floats(at.estimates),
          reinterpret_cast<int32_t*>(bytes + at.pairs),
          reinterpret_cast<int32_t*>(bytes + at.heap),
          reinterpret_cast<uint8_t*>(bytes + at.kept)};
}

// How much of the spread of a page's bounds a query is credited with: 1 would be Quest's upper
// bound (arXiv:2406.10774), which ranks worse: 0.92 of the best pages' mass against 0.96 (four
// heads that share a list, 90 % left out).
constexpr float kBoundShare = 0.5f;

inline bool IsFinite(const float* values, int64_t count) {
  VecF zeros = {};
  float zero = 0.0f;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) zeros += Load(values + i) * 0.0f;
  for (; i < count; ++i) zero += values[i] * 0.0f;
  return HorizontalSum(zeros) + zero == 0.0f;
}

// Lanes' mean queries, scaled, [dimension][lanes]; for bounds [dimension][2][lanes]: what
// multiplies the least key, and what multiplies the greatest. A row that is not finite counts as
// zero: its result is NaN whatever it attends to.
inline void PoolQueries(const Selection& s, bool bounds) {
  const cpu::SelectionTask& task = s.task;
  const int64_t dim = task.head_dim;
  for (int64_t i = 0; i < s.lanes * dim; ++i) s.pooled[i] = 0.0f;
  for (int64_t i = 0; i < 5 * s.lanes; ++i) s.rows[i] = 0.0f;
  for (int64_t i = 0; i < task.rows; ++i) {
    if (task.ranges[i].begin >= task.ranges[i].end) continue;
    const float* const query = task.queries + i * task.query_stride;
    const int64_t lane = s.row_lanes[i];
    const int64_t index = task.first_row + i;
    s.rows[lane] += 1.0f;
    s.position[lane] += static_cast<float>(task.first_position + index / task.group);
    if (task.alibi_slopes != nullptr) s.slope[lane] = task.alibi_slopes[index % task.group];
    if (!IsFinite(query, dim)) continue;
    float* const pooled = s.pooled + lane * dim;
    for (int64_t d = 0; d < dim; ++d) pooled[d] += query[d];
  }
  for (int64_t lane = 0; lane < s.lanes; ++lane) {
    const float factor = s.rows[lane] > 0.0f ? 1.0f / s.rows[lane] : 0.0f;
    s.position[lane] *= factor;
    float length = 0.0f;
    for (int64_t d = 0; d < dim; ++d) {
      const float q = s.pooled[lane * dim + d] * (factor * task.scale);
      length += q * q;
      const float more = kBoundShare * (q < 0.0f ? -q : q);
      if (bounds) {
        s.query[2 * d * s.lanes + lane] = 0.5f * (q - more);
        s.query[(2 * d + 1) * s.lanes + lane] = 0.5f * (q + more);
      } else {
        s.query[d * s.lanes + lane] = q;
      }
    }
    s.norm[lane] = __builtin_sqrtf(length);
  }
}

// acc[page][vector][vec] = the pooled queries of kVecs * kLanes lanes times a summary's vectors
// [dim][kVectors], for kPages pages side by side. `query`: [dim][lanes].
template <int kVectors, int kPages, int kVecs>
inline void MultiplySummaries(const float* query, int64_t lanes, int64_t dim,
                              const float* summaries, int64_t stride,
                              VecF (&acc)[kPages][kVectors][kVecs]) {
  // Summaries come from the third-level cache: the next ones are fetched a piece ahead.
  constexpr int64_t kPiece = 8;  // dimensions
  constexpr int64_t kLine = 16;  // floats
  VecF sums[kPages][kVectors][kVecs] = {};
  for (int64_t d = 0; d < dim; ++d) {
    if (d % kPiece == 0) {
      for (int p = 0; p < kPages; ++p) {
#pragma GCC unroll 8
        for (int64_t line = 0; line < kVectors * kPiece; line += kLine) {
          __builtin_prefetch(summaries + (kPages + p) * stride + d * kVectors + line);
        }
      }
    }
    VecF q[kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) q[i] = Load(query + d * lanes + i * kLanes);
#pragma GCC unroll 8
    for (int p = 0; p < kPages; ++p) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const float key = summaries[p * stride + d * kVectors + v];
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i) sums[p][v][i] += q[i] * key;
      }
    }
  }
  for (int p = 0; p < kPages; ++p) {
    for (int v = 0; v < kVectors; ++v) {
      for (int i = 0; i < kVecs; ++i) acc[p][v][i] = sums[p][v][i];
    }
  }
}

// The log-mean-exp of 32 scores of this standard deviation, over their mean: half the variance, as
// for a Gaussian, until the greatest of so few dominates; from sqrt(2 ln 32) on it grows with the
// deviation alone (the freezing of Derrida's random energy model, Phys. Rev. B 24, 2613).
inline VecF SpreadGain(VecF deviation) {
  constexpr float kFreezing = 2.63276f;
  const VecF bounded = deviation < kFreezing ? deviation : Broadcast(kFreezing);
  return bounded * (deviation - bounded * 0.5f);
}

// From the scores of one page's vectors to its weight for the lanes at `lane`: exp(top) * sum. A
// weight that is not a number stays in `sum`; `top` is then -inf.
template <int kVectors>
inline void WeighPage(const Selection& s, int64_t page, int64_t lane, const float* counts,
                      const float* spreads, VecF (&scores)[kVectors]) {
  const cpu::SelectionTask& task = s.task;
  VecF top = Broadcast(-kInfinity);
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    if (kVectors > 1 && v < static_cast<int>(cpu::kSummaryMeans)) {
      scores[v] += SpreadGain(Load(s.norm + lane) * spreads[v]);
    }
    if (task.soft_cap > 0.0f) scores[v] = Tanh(scores[v] / task.soft_cap) * task.soft_cap;
    if (counts[v] != 0.0f) top = scores[v] > top ? scores[v] : top;
  }
  const VecF shift = top == -kInfinity ? VecF{} : top;
  VecF sum = {};
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    if (counts[v] != 0.0f) sum += Exp(scores[v] - shift) * counts[v];
  }
  if (task.alibi_slopes != nullptr) {
    // The distance to the page's nearest key.
    const float first = static_cast<float>((s.first_page + page) * kPageTokens);
    const VecF position = Load(s.position + lane);
    const VecF before = first - position;
    const VecF behind = position - (first + static_cast<float>(kPageTokens - 1));
    const VecF farther = before > behind ? before : behind;
    top -= Load(s.slope + lane) * (farther > 0.0f ? farther : VecF{});
  }
  const VecF visible = Load(s.visible + lane);
  sum *= visible;
  const VecI unweighted = (visible == 0.0f) | (sum != sum);
  top = unweighted ? Broadcast(-kInfinity) : top;
  Store(top, s.tops + page * s.lanes + lane);
  Store(sum, s.sums + page * s.lanes + lane);
}

inline int64_t TokensOfPage(const Selection& s, int64_t page) {
  const int64_t left = s.task.kv_len - (s.first_page + page) * kPageTokens;
  return left < kPageTokens ? left : kPageTokens;
}

// Counts the visible pairs of a page, and sets every lane's share of its own.
inline int64_t VisiblePairs(const Selection& s, int64_t page) {
  const int64_t first = (s.first_page + page) * kPageTokens;
  const int64_t end = first + TokensOfPage(s, page);
  if (first >= s.common.begin && end <= s.common.end) {
    for (int64_t lane = 0; lane < s.lanes; ++lane) s.visible[lane] = 1.0f;
    return s.task.rows * (end - first);
  }
  for (int64_t lane = 0; lane < s.lanes; ++lane) s.visible[lane] = 0.0f;
  int64_t pairs = 0;
  for (int64_t i = 0; i < s.task.rows; ++i) {
    const KeyRange& keys = s.task.ranges[i];
    const int64_t low = keys.begin > first ? keys.begin : first;
    const int64_t high = keys.end < end ? keys.end : end;
    if (high <= low) continue;
    pairs += high - low;
    s.visible[s.row_lanes[i]] += static_cast<float>(high - low);
  }
  for (int64_t lane = 0; lane < s.lanes; ++lane) {
    if (s.visible[lane] > 0.0f) s.visible[lane] /= s.rows[lane] * static_cast<float>(end - first);
  }
  return pairs;
}

// tops, sums and pairs of kPages pages.
template <int kVectors, int kPages, int kVecs>
inline void WeighPages(const Selection& s, int64_t page, int64_t lane) {
  const cpu::SelectionTask& task = s.task;
  const int64_t dim = kVectors == 1 ? 2 * task.head_dim : task.head_dim;
  const float* const summaries = task.summaries + (s.first_page + page) * task.summary_stride;
  VecF acc[kPages][kVectors][kVecs];
  MultiplySummaries<kVectors, kPages, kVecs>(s.query + lane, s.lanes, dim, summaries,
                                             task.summary_stride, acc);
  for (int p = 0; p < kPages; ++p) {
    const float* const counts = summaries + p * task.summary_stride + kVectors * dim;
    const float tokens = static_cast<float>(TokensOfPage(s, page + p));
    const int64_t pairs = VisiblePairs(s, page + p);
    s.pairs[page + p] = static_cast<int32_t>(pairs);
    for (int i = 0; i < kVecs; ++i) {
      VecF scores[kVectors];
      for (int v = 0; v < kVectors; ++v) scores[v] = acc[p][v][i];
      WeighPage<kVectors>(s, page + p, lane + i * kLanes, kVectors == 1 ? &tokens : counts,
                          counts + kVectors, scores);
    }
  }
}

// All lanes of kPages pages: two vectors of lanes at a time fill the registers by themselves.
template <int kVectors, int kPages>
inline void WeighAllLanes(const Selection& s, int64_t page) {
  int64_t lane = 0;
  if constexpr (kPages == 1) {
    for (; lane + 2 * kLanes <= s.lanes; lane += 2 * kLanes) {
      WeighPages<kVectors, 1, 2>(s, page, lane);
    }
  }
  for (; lane < s.lanes; lane += kLanes) WeighPages<kVectors, kPages, 1>(s, page, lane);
}

template <int kVectors>
inline void WeighAllPages(const Selection& s) {
  constexpr int kSide = kVectors == 1 ? 8 : 3;
  int64_t page = 0;
  if (s.lanes == kLanes || kVectors == 1) {
    for (; page + kSide <= s.pages; page += kSide) WeighAllLanes<kVectors, kSide>(s, page);
  }
  for (; page < s.pages; ++page) WeighAllLanes<kVectors, 1>(s, page);
}

// Each lane's softmax over pages, then each page's share of the attention of all rows. Pages whose
// weight is not a number are marked as kept.
inline void NormaliseEstimates(const Selection& s) {
  float rows = 0.0f;
  for (int64_t lane = 0; lane < s.lanes; lane += kLanes) {
    VecF greatest = Broadcast(-kInfinity);
    for (int64_t p = 0; p < s.pages; ++p) {
      const VecF top = Load(s.tops + p * s.lanes + lane);
      greatest = top > greatest ? top : greatest;
    }
    const VecF shift = greatest == -kInfinity ? VecF{} : greatest;
    VecF total = {};
    for (int64_t p = 0; p < s.pages; ++p) {
      float* const sums = s.sums + p * s.lanes + lane;
      const VecF weight = Load(sums) * Exp(Load(s.tops + p * s.lanes + lane) - shift);
      Store(weight, sums);
      total += weight == weight ? weight : VecF{};
    }
    const VecF seen = total > 0.0f ? Load(s.rows + lane) : VecF{};
    Store(total > 0.0f ? seen / total : VecF{}, s.inverse + lane);
    rows += HorizontalSum(seen);
  }
  const float factor = rows > 0.0f ? 1.0f / rows : 0.0f;
  for (int64_t p = 0; p < s.pages; ++p) {
    VecF sum = {};
    for (int64_t lane = 0; lane < s.lanes; lane += kLanes) {
      sum += Load(s.sums + p * s.lanes + lane) * Load(s.inverse + lane);
    }
    const float estimate = HorizontalSum(sum) * factor;
    if (estimate != estimate) s.kept[p] = 1;
    s.estimates[p] = estimate == estimate ? estimate : 0.0f;
  }
}
