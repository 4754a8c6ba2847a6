// The two products of a tile over register blocks: kM rows against kN vectors of keys, or of
// columns of values. Accumulators are float32, and every one runs through its dimensions (or keys)
// in order, so that a result's bits do not depend on the block's size. Included after vec-inl.h.

// Rows of a block, and vectors beside them: as many accumulators as registers hold.
constexpr int kBlockRows = kLanes == 4 ? 4 : 6;
constexpr int kBlockVecs = kLanes == 16 ? 4 : 2;
constexpr int kVecsPerPanel = static_cast<int>(kPanelWidth) / kLanes;
constexpr int kStepKeys = static_cast<int>(cpu::kFlashStepPages * kPageTokens);
constexpr int kStepStride = kStepKeys + 16;  // of rows of scores: no power of two

// Vectors of keys or columns that kRows rows take. Fewer rows than a block holds wait for memory
// anyway: they take a panel at a time, which is read from front to back.
constexpr int VecsFor(int rows) { return rows == kBlockRows ? kBlockVecs : kVecsPerPanel; }

// Byte offset of a block's vector of keys or columns from its first one.
[[gnu::always_inline]] constexpr int64_t VecOffset(int vec, int vec_bytes, int64_t panel_bytes) {
  return vec / kVecsPerPanel * panel_bytes + vec % kVecsPerPanel * vec_bytes;
}

// Accumulators of a block that starts from nothing are loaded too, from here: with a branch, or an
// array that is cleared as a whole, the compiler keeps all of them in memory.
alignas(64) const float kZeros[kBlockVecs * kVecsPerPanel * kLanes] = {};

template <int kM, int kN>
[[gnu::always_inline]] inline void StartBlock(const float* from, int64_t stride,
                                              VecF (&acc)[kM][kN]) {
  if (from == nullptr) stride = 0;
  const float* const start = from == nullptr ? kZeros : from;
  for (int r = 0; r < kM; ++r) {
    for (int i = 0; i < kN; ++i) acc[r][i] = Load(start + r * stride + i * kLanes);
  }
}

// Asks for kBytes bytes of what comes next. Where a block spans several panels it is one of many
// that take them, and memory does not matter.
// Loops over groups are unrolled (`GCC unroll`): two thirds of their instructions multiply, where
// it is less than half with a counter and four addresses for each group. That matters where another
// thread of the same core takes its share of what the core can start.
template <int kM, int kN, int kVecBytes>
[[gnu::always_inline]] inline void Fetch(const char* from) {
  if constexpr (kN <= kVecsPerPanel) {
    for (int at = 0; at < kN * kVecBytes; at += 64) __builtin_prefetch(from + at);
  }
}

// A page's elements as float32. They lie in groups of kDepth dimensions (of keys) or tokens (of
// values) beside each other, kBytes for each key or column.
template <ElementType kType>
struct Panel;

template <>
struct Panel<ElementType::kFloat32> {
  static constexpr int kDepth = 1;
  static constexpr int kBytes = 4;
  static inline VecF Get(const char* at, int) { return Load(reinterpret_cast<const float*>(at)); }
};

template <>
struct Panel<ElementType::kFloat16> {
  static constexpr int kDepth = 1;
  static constexpr int kBytes = 2;
  static inline VecF Get(const char* at, int) {
    return WidenFloat16(LoadHalves(reinterpret_cast<const uint16_t*>(at)));
  }
};

template <>
struct Panel<ElementType::kBFloat16> {
  static constexpr int kDepth = 2;
  static constexpr int kBytes = 4;
  static inline VecF Get(const char* at, int which) {
    VecU pairs;
    __builtin_memcpy(&pairs, at, sizeof(pairs));
    return reinterpret_cast<VecF>(which == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
};

template <>
struct Panel<ElementType::kInt8> {
  static constexpr int kDepth = 4;
  static constexpr int kBytes = 4;
  static inline VecF Get(const char* at, int which) {
    VecI quads;
    __builtin_memcpy(&quads, at, sizeof(quads));
    return __builtin_convertvector(quads << (24 - 8 * which) >> 24, VecF);
  }
};

// Bytes from one panel of values to the next.
template <class P>
constexpr int64_t ValuePanelBytes() {
  return kPageTokens / P::kDepth * kPanelWidth * P::kBytes;
}

// Whether an arithmetic rounds rows of queries, and of a step's weights, to integers, each with a
// scale of its own: flash_tile_int8-inl.h.
template <class A>
constexpr bool kScalesRows = false;

// Products in float32 over pages of any type.
template <ElementType kType>
struct Widened {
  typedef Panel<kType> P;
  static constexpr ElementType kPageType = kType;
  static constexpr int kDepth = P::kDepth;
  static constexpr int kOperandBytes = 4;  // of an element of the packed queries, of a weight

  // Rows of a block interleaved: [groups][kDepth][kBlockRows].
  static inline void SetQuery(char* block, int64_t d, int row, float value) {
    reinterpret_cast<float*>(block)[d * kBlockRows + row] = value;
  }

  static inline float GetQuery(const char* block, int64_t d, int row) {
    return reinterpret_cast<const float*>(block)[d * kBlockRows + row];
  }

  // scores[r][key] = sum over `groups` groups of dimensions, for kN vectors of keys; panels lie
  // `panel_bytes` apart. `fetch`: what comes next in memory.
  template <int kM, int kN>
  [[gnu::noinline]] static void Score(const char* query, const char* keys, const char* fetch,
                                      int64_t groups, int64_t panel_bytes, float* scores) {
    constexpr int kVecBytes = kLanes * P::kBytes;
    VecF acc[kM][kN];
    StartBlock(nullptr, 0, acc);
    const float* q = reinterpret_cast<const float*>(query);
#pragma GCC unroll 4
    for (int64_t group = 0; group < groups; ++group) {
      Fetch<kM, kN, kVecBytes>(fetch);
      for (int j = 0; j < kDepth; ++j) {
        VecF k[kN];
        for (int i = 0; i < kN; ++i) k[i] = P::Get(keys + VecOffset(i, kVecBytes, panel_bytes), j);
        for (int r = 0; r < kM; ++r) {
          const VecF x = Broadcast(q[j * kBlockRows + r]);
          for (int i = 0; i < kN; ++i) acc[r][i] += x * k[i];
        }
      }
      q += kDepth * kBlockRows;
      keys += kPanelWidth * P::kBytes;
      fetch += kPanelWidth * P::kBytes;
    }
    for (int r = 0; r < kM; ++r) {
      for (int i = 0; i < kN; ++i) Store(acc[r][i], scores + r * kStepStride + i * kLanes);
    }
  }

  // Weights lie where their scores were.
  static inline void SetWeights(VecF p, float* row, int64_t column) { Store(p, row + column); }
  static inline bool IsZero(const char* weight) {
    return Elements<ElementType::kFloat32>::LoadOne(reinterpret_cast<const float*>(weight)) == 0.0f;
  }

  // acc[r][column] += the weights of `groups` groups of tokens times their values, kN vectors of
  // columns.
  template <int kM, int kN>
  static inline void Weigh(const char* weights, const char* values, const char* fetch,
                           int64_t groups, VecF (&acc)[kM][kN]) {
    constexpr int kVecBytes = kLanes * P::kBytes;
    const float* w = reinterpret_cast<const float*>(weights);
#pragma GCC unroll 4
    for (int64_t group = 0; group < groups; ++group) {
      Fetch<kM, kN, kVecBytes>(fetch);
      for (int j = 0; j < kDepth; ++j) {
        VecF v[kN];
        for (int i = 0; i < kN; ++i) {
          v[i] = P::Get(values + VecOffset(i, kVecBytes, ValuePanelBytes<P>()), j);
        }
        for (int r = 0; r < kM; ++r) {
          const VecF x = Broadcast(w[r * kStepStride + j]);
          for (int i = 0; i < kN; ++i) acc[r][i] += x * v[i];
        }
      }
      w += kDepth;
      values += kPanelWidth * P::kBytes;
      fetch += kPanelWidth * P::kBytes;
    }
  }
};

// Whether an arithmetic's packed queries are float32, kBlockRows rows interleaved.
template <class A>
constexpr bool kInterleavesFloats = false;
template <ElementType kType>
constexpr bool kInterleavesFloats<Widened<kType>> = true;

typedef float Quad __attribute__((vector_size(16)));

// Four dimensions of kBlockRows rows, interleaved: block[d][row].
inline void InterleaveQuads(const Quad (&rows)[kBlockRows], float* block) {
  const Quad low01 = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const Quad high01 = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const Quad low23 = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const Quad high23 = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  const Quad columns[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                           __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                           __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                           __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int d = 0; d < 4; ++d) {
    __builtin_memcpy(block + d * kBlockRows, &columns[d], sizeof(Quad));
  }
  if constexpr (kBlockRows == 6) {
    const Quad low45 = __builtin_shufflevector(rows[4], rows[5], 0, 4, 1, 5);
    const Quad high45 = __builtin_shufflevector(rows[4], rows[5], 2, 6, 3, 7);
    const Quad pairs[4] = {low45, __builtin_shufflevector(low45, low45, 2, 3, 0, 1), high45,
                           __builtin_shufflevector(high45, high45, 2, 3, 0, 1)};
    for (int d = 0; d < 4; ++d) {
      __builtin_memcpy(block + d * kBlockRows + 4, &pairs[d], sizeof(Quad) / 2);
    }
  }
}

// The values of one step: its pages, and which of their tokens a block of rows takes.
struct StepValues {
  const char* pages[cpu::kFlashStepPages];  // start of each page's values
  int64_t begin;                            // columns of the step, multiples of a group
  int64_t end;
  int64_t columns;  // of values, whole panels
};

enum class Add { kToZero, kToSum, kToOutput };  // what becomes of a block's product

// Where a group of tokens' values begin, from `column` (of values) on.
template <class P>
inline const char* ValuesAt(const StepValues& values, int64_t token, int64_t column) {
  return values.pages[token / kPageTokens] + column / kPanelWidth * ValuePanelBytes<P>() +
         (token % kPageTokens / P::kDepth * kPanelWidth + column % kPanelWidth) * P::kBytes;
}

// out[r][column] = product; += it in order; or += the finished product.
template <class A, int kM, int kN>
[[gnu::noinline]] void ValueBlock(const char* weights, const StepValues& values, int64_t column,
                                  int64_t fetch, Add add, float* out, int64_t out_stride) {
  VecF acc[kM][kN];
  StartBlock(add == Add::kToSum ? out : nullptr, out_stride, acc);
  for (int64_t at = values.begin; at < values.end;) {
    const int64_t page_end = (at / kPageTokens + 1) * kPageTokens;
    const int64_t end = page_end < values.end ? page_end : values.end;
    const char* const from = ValuesAt<typename A::P>(values, at, column);
    A::template Weigh<kM, kN>(weights + at * A::kOperandBytes, from, from + fetch,
                              (end - at) / A::kDepth, acc);
    at = end;
  }
  for (int r = 0; r < kM; ++r) {
    for (int i = 0; i < kN; ++i) {
      float* const to = out + r * out_stride + i * kLanes;
      Store(add == Add::kToOutput ? Load(to) + acc[r][i] : acc[r][i], to);
    }
  }
}
