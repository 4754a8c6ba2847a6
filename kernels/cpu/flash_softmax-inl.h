// Scores of one row and one step of keys on their way to weights, in place, with the row's running
// maximum and sum. Exponentials are powers of two: scale and log2 e become one factor. Included
// after score_row-inl.h and flash_tile-inl.h.

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
// The reference of a row's exponentials lags behind its maximum by up to this many powers of two: a
// row is rescaled seldom, weights stay below 2^8 (FlashAttention-4's conditional rescaling).
constexpr float kRescaleLag = 8.0f;

// 2^x for x <= 127 or NaN; relative error below 2.2e-7: x = n + f, |f| <= 1/2, a minimax polynomial
// in f. Below 2^-126.5 it is exactly zero, so that hidden keys (-inf) vanish without a mask.
inline VecF Exp2(VecF x) {
  // Adding it leaves n + 127, the exponent's bits, in the last bits; at n = -127 they are zero.
  constexpr float kRound = 12582912.0f + 127.0f;
  const VecF clamped = MaxOrSecond(Broadcast(-127.0f), x);
  const VecF shifted = clamped + kRound;
  const VecF f = clamped - (shifted - kRound);
  VecF p = Broadcast(1.3276472454890609e-3f);
  p = p * f + 9.675540961325169e-3f;
  p = p * f + 5.550713092088699e-2f;
  p = p * f + 2.4022120237350464e-1f;
  p = p * f + 6.931469440460205e-1f;
  p = p * f + 1.0f;
  return p * reinterpret_cast<VecF>(reinterpret_cast<VecU>(shifted) << 23);
}

inline float Exp2One(float x) { return Exp2(Broadcast(x))[0]; }

// Scores still lack this factor: those that were transformed have the scale in them.
inline bool TransformsScores(const AttentionArgs& args) {
  return args.soft_cap > 0.0f || args.alibi_slopes != nullptr ||
         args.mask.type != MaskType::kNone || !(args.scale > 0.0f);
}
inline float ScoreFactor(const AttentionArgs& args) {
  return TransformsScores(args) ? 1.0f : args.scale;
}

// The state of one row within a segment: the score that its exponentials are relative to (before
// ScoreFactor: large scores, such as masks' lowest numbers, must cancel exactly and not overflow),
// and their sum. Beside it, elsewhere, the sum of weights times values.
struct RowState {
  float reference;
  float sum;
};
inline RowState EmptyRow() { return {-kInfinity, 0.0f}; }

inline void ScaleRow(float factor, int64_t columns, float* row) {
  for (int64_t c = 0; c < columns; c += kLanes) Store(Load(row + c) * factor, row + c);
}

// (state, output) += (other, more): FlashAttention's merge by log-sum-exp. A part that saw nothing
// changes no bit.
inline void MergeRow(RowState other, const float* more, int64_t columns, float factor,
                     RowState* state, float* output) {
  if (other.sum == 0.0f) return;  // false for NaN
  if (state->sum == 0.0f) {
    *state = other;
    for (int64_t c = 0; c < columns; c += kLanes) Store(Load(more + c), output + c);
    return;
  }
  const float reference = other.reference > state->reference ? other.reference : state->reference;
  const float a = Exp2One((state->reference - reference) * factor);
  const float b = Exp2One((other.reference - reference) * factor);
  state->reference = reference;
  state->sum = state->sum * a + other.sum * b;
  for (int64_t c = 0; c < columns; c += kLanes) {
    Store(Load(output + c) * a + Load(more + c) * b, output + c);
  }
}

// Columns [begin, end) of a step as one row sees them: whole vectors [first, last) are computed,
// and those outside of [begin, end) become -inf.
struct VisibleColumns {
  int64_t first;
  int64_t last;
  int64_t begin;
  int64_t end;
};

inline void HideColumns(const VisibleColumns& columns, float* row) {
  VecF lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<float>(i);
  for (int64_t j = columns.first; j < columns.last; j += kLanes) {
    if (j >= columns.begin && j + kLanes <= columns.end) {
      j = columns.end / kLanes * kLanes - kLanes;
      continue;
    }
    const VecF column = lane + static_cast<float>(j);
    const VecI hidden =
        (column < static_cast<float>(columns.begin)) | (column >= static_cast<float>(columns.end));
    Store(hidden ? Broadcast(-kInfinity) : Load(row + j), row + j);
  }
}

// The largest of the columns [first, last) that is not NaN; -inf where there is none.
inline float LargestScore(int64_t first, int64_t last, const float* row) {
  VecF largest = Broadcast(-kInfinity);
  VecF other = largest;
  int64_t j = first;
  for (; j + kLanes < last; j += 2 * kLanes) {
    largest = MaxOrSecond(Load(row + j), largest);
    other = MaxOrSecond(Load(row + j + kLanes), other);
  }
  if (j < last) largest = MaxOrSecond(Load(row + j), largest);
  return HorizontalMax(MaxOrSecond(other, largest));
}

// Moves the row's reference to `top`, where that has grown by too much.
inline void RaiseReference(float top, float factor, RowState* state, float* output,
                           int64_t columns) {
  if (!((top - state->reference) * factor > kRescaleLag)) return;
  if (state->reference != -kInfinity) {
    const float scale = Exp2One((state->reference - top) * factor);
    state->sum *= scale;
    ScaleRow(scale, columns, output);
  }
  state->reference = top;
}

// row[j] -> 2^(factor * (row[j] - reference)) for the columns [first, last) of kRows rows side by
// side, which hides the exponential's latency; adds them to the states' sums.
template <class A, int kRows>
[[gnu::always_inline]] inline void WeighTogether(int64_t first, int64_t last, float factor,
                                                 float* row, RowState* states) {
  VecF references[kRows];
  VecF sums[kRows];
  for (int r = 0; r < kRows; ++r) {
    const float reference = states[r].reference;
    references[r] = Broadcast(reference == -kInfinity ? 0.0f : reference);
    sums[r] = Broadcast(0.0f);
  }
  for (int64_t j = first; j < last; j += kLanes) {
    for (int r = 0; r < kRows; ++r) {
      float* const scores = row + r * kStepStride;
      const VecF p = Exp2((Load(scores + j) - references[r]) * factor);
      sums[r] += p;
      A::SetWeights(p, scores, j);
    }
  }
  for (int r = 0; r < kRows; ++r) states[r].sum += HorizontalSum(sums[r]);
}

// Weights of the columns [first, last) of `rows` rows of scores, with their states and outputs. All
// maxima come first, so that rows do not wait for each other.
template <class A>
inline void WeighScores(int64_t first, int64_t last, float factor, int64_t rows, float* row,
                        RowState* states, float* output, int64_t columns) {
  float tops[kBlockRows];
  for (int64_t r = 0; r < rows; ++r) tops[r] = LargestScore(first, last, row + r * kStepStride);
  for (int64_t r = 0; r < rows; ++r) {
    RaiseReference(tops[r], factor, states + r, output + r * columns, columns);
  }
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    WeighTogether<A, 2>(first, last, factor, row + r * kStepStride, states + r);
  }
  if (r < rows) WeighTogether<A, 1>(first, last, factor, row + r * kStepStride, states + r);
}
