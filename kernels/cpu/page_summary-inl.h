// What the selection of pages knows of a page: its summary, or its bounds (sparse_selection.h says
// what they hold). Included after vec-inl.h.

constexpr int kSelectionVecs = static_cast<int>(kPageTokens) / kLanes;  // of a page's tokens

inline VecF KeepLanes(VecF v, VecI mask) {
  return reinterpret_cast<VecF>(reinterpret_cast<VecI>(v) & mask);
}

// One bit pattern per token: all ones, or zero where the token does not count.
struct TokenMask {
  int32_t bits[kPageTokens];
  inline VecI Vec(int i) const {
    VecI mask;
    __builtin_memcpy(&mask, bits + i * kLanes, sizeof(mask));
    return mask;
  }
};

// The mean of the tokens [first * kLanes, last * kLanes) that count, `step` floats from one
// dimension to the next.
inline void MeanKey(const float* keys, int64_t head_dim, const TokenMask& mask, int first, int last,
                    float* mean, int64_t step) {
  int32_t count = 0;
  for (int t = first * kLanes; t < last * kLanes; ++t) count -= mask.bits[t];
  const float factor = count > 0 ? 1.0f / static_cast<float>(count) : 0.0f;
  for (int64_t d = 0; d < head_dim; ++d) {
    VecF sum = {};
    for (int i = first; i < last; ++i) {
      sum += KeepLanes(Load(keys + d * kPageTokens + i * kLanes), mask.Vec(i));
    }
    mean[d * step] = HorizontalSum(sum) * factor;
  }
}

// Every token's squared distance from the summary's first vector (null: from zero); zero where it
// does not count.
inline void SquaredDistances(const float* keys, int64_t head_dim, const TokenMask& mask,
                             const float* centre, float* squares) {
  VecF sums[kSelectionVecs] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    const float at = centre == nullptr ? 0.0f : centre[d * cpu::kSummaryVectors];
    for (int i = 0; i < kSelectionVecs; ++i) {
      const VecF offset = Load(keys + d * kPageTokens + i * kLanes) - at;
      sums[i] += offset * offset;
    }
  }
  for (int i = 0; i < kSelectionVecs; ++i) {
    Store(KeepLanes(sums[i], mask.Vec(i)), squares + i * kLanes);
  }
}

// Moves the token farthest out from `mask` into the outlier `vector` and returns how many it was:
// 1, or 0 where no token was left.
inline float TakeOutlier(const float* keys, int64_t head_dim, const float* squares, TokenMask* mask,
                         float* vector) {
  int64_t farthest = -1;
  for (int64_t t = 0; t < kPageTokens; ++t) {
    if (mask->bits[t] == 0) continue;
    if (farthest < 0 || squares[t] > squares[farthest]) farthest = t;
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    vector[d * cpu::kSummaryVectors] = farthest < 0 ? 0.0f : keys[d * kPageTokens + farthest];
  }
  if (farthest < 0) return 0.0f;
  mask->bits[farthest] = 0;
  return 1.0f;
}

// Writes the summary of a page: keys [head_dim][64], the first `count` tokens valid (the others'
// memory may hold anything). A page with a key that is not finite, or whose square is not, gets NaN
// for its counts: it is then kept by every selection.
inline void SummarizePage(const float* keys, int64_t head_dim, int64_t count, float* summary) {
  float* const counts = summary + cpu::kSummaryVectors * head_dim;
  float* const spreads = counts + cpu::kSummaryVectors;
  TokenMask mask;
  for (int64_t t = 0; t < kPageTokens; ++t) mask.bits[t] = t < count ? -1 : 0;
  float lengths[kPageTokens];
  SquaredDistances(keys, head_dim, mask, nullptr, lengths);
  float total = 0.0f;
  for (int64_t t = 0; t < kPageTokens; ++t) total += lengths[t];
  const float trouble = total - total;  // 0, or NaN

  float distances[kPageTokens];
  MeanKey(keys, head_dim, mask, 0, kSelectionVecs, summary, cpu::kSummaryVectors);
  SquaredDistances(keys, head_dim, mask, summary, distances);
  for (int64_t o = 0; o < cpu::kSummaryOutliers; ++o) {
    const float* const squares = o < cpu::kSummaryOutliers / 2 ? lengths : distances;
    counts[cpu::kSummaryMeans + o] =
        TakeOutlier(keys, head_dim, squares, &mask, summary + cpu::kSummaryMeans + o) + trouble;
  }
  constexpr int kMeanVecs = kSelectionVecs / static_cast<int>(cpu::kSummaryMeans);
  for (int m = 0; m < static_cast<int>(cpu::kSummaryMeans); ++m) {
    float* const mean = summary + m;
    MeanKey(keys, head_dim, mask, m * kMeanVecs, (m + 1) * kMeanVecs, mean, cpu::kSummaryVectors);
    float tokens = 0.0f;
    float squares = 0.0f;
    for (int t = m * kMeanVecs * kLanes; t < (m + 1) * kMeanVecs * kLanes; ++t) {
      if (mask.bits[t] == 0) continue;
      tokens += 1.0f;
      squares += lengths[t];
    }
    float length = 0.0f;
    for (int64_t d = 0; d < head_dim; ++d) {
      const float at = mean[d * cpu::kSummaryVectors];
      length += at * at;
    }
    const float variance =
        tokens > 0.0f ? (squares / tokens - length) / static_cast<float>(head_dim) : 0.0f;
    counts[m] = tokens + trouble;
    spreads[m] = variance > 0.0f ? __builtin_sqrtf(variance) : 0.0f;
  }
}

// Widens a page's bounds by the tokens [first, end) of keys [head_dim][64]; first 0 starts them
// anew. A NaN among the keys makes bounds that keep the page.
inline void BoundPage(const float* keys, int64_t head_dim, int64_t first, int64_t end,
                      float* bounds) {
  for (int64_t d = 0; d < head_dim; ++d) {
    float low = first == 0 ? kInfinity : bounds[2 * d];
    float high = first == 0 ? -kInfinity : bounds[2 * d + 1];
    bool nan = low != low;
    for (int64_t t = first; t < end; ++t) {
      const float key = keys[d * kPageTokens + t];
      nan = nan || key != key;
      low = key < low ? key : low;
      high = key > high ? key : high;
    }
    bounds[2 * d] = nan ? __builtin_nanf("") : low;
    bounds[2 * d + 1] = nan ? __builtin_nanf("") : high;
  }
}
