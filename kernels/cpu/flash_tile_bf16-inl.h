// The products of flash_tile-inl.h with the instruction that multiplies pairs of bfloat16 and adds
// them in float32 (vdpbf16ps): queries, keys, weights and values stay bfloat16. It rounds to
// nearest even and flushes subnormal numbers, whatever the environment says. Included after
// flash_tile-inl.h, in units of instruction sets that have it.

struct NativeBFloat16 {
  typedef Panel<ElementType::kBFloat16> P;
  static constexpr ElementType kPageType = ElementType::kBFloat16;
  static constexpr int kDepth = 2;
  static constexpr int kOperandBytes = 2;

  static inline VecF Broadcast2(const char* pair) {
    int32_t bits;
    __builtin_memcpy(&bits, pair, sizeof(bits));
    return reinterpret_cast<VecF>(_mm512_set1_epi32(bits));
  }
  static inline VecF LoadPairs(const char* at) {
    VecF pairs;
    __builtin_memcpy(&pairs, at, sizeof(pairs));
    return pairs;
  }
  static inline VecF Dot(VecF sum, VecF a, VecF b) {
    return reinterpret_cast<VecF>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                   reinterpret_cast<__m512bh>(a),
                                                   reinterpret_cast<__m512bh>(b)));
  }

  // Pairs of dimensions, rows of a block interleaved: [groups][kBlockRows][2]. Queries are bfloat16
  // already: nothing is rounded.
  static inline void SetQuery(char* block, int64_t d, int row, float value) {
    const auto half = static_cast<uint16_t>(BitsOf(value) >> 16);
    __builtin_memcpy(block + ((d / 2 * kBlockRows + row) * 2 + d % 2) * 2, &half, sizeof(half));
  }

  static inline float GetQuery(const char* block, int64_t d, int row) {
    return WidenBFloat16(LoadHalf(
        reinterpret_cast<const uint16_t*>(block + ((d / 2 * kBlockRows + row) * 2 + d % 2) * 2)));
  }

  template <int kM, int kN>
  [[gnu::noinline]] static void Score(const char* query, const char* keys, const char* fetch,
                                      int64_t groups, int64_t panel_bytes, float* scores) {
    constexpr int kVecBytes = kLanes * P::kBytes;
    VecF acc[kM][kN];
    StartBlock(nullptr, 0, acc);
    for (int64_t group = 0; group < groups; ++group) {
      Fetch<kM, kN, kVecBytes>(fetch);
      VecF k[kN];
      for (int i = 0; i < kN; ++i) k[i] = LoadPairs(keys + VecOffset(i, kVecBytes, panel_bytes));
      for (int r = 0; r < kM; ++r) {
        const VecF x = Broadcast2(query + r * 4);
        for (int i = 0; i < kN; ++i) acc[r][i] = Dot(acc[r][i], x, k[i]);
      }
      query += kBlockRows * 4;
      keys += kPanelWidth * P::kBytes;
      fetch += kPanelWidth * P::kBytes;
    }
    for (int r = 0; r < kM; ++r) {
      for (int i = 0; i < kN; ++i) Store(acc[r][i], scores + r * kStepStride + i * kLanes);
    }
  }

  // Weights lie where their scores were, in the first half of the row.
  static inline void SetWeights(VecF p, float* row, int64_t column) {
    const auto halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(p));
    __builtin_memcpy(reinterpret_cast<char*>(row) + column * 2, &halves, sizeof(halves));
  }
  static inline bool IsZero(const char* weight) {
    return LoadHalf(reinterpret_cast<const uint16_t*>(weight)) == 0;
  }

  template <int kM, int kN>
  static inline void Weigh(const char* weights, const char* values, const char* fetch,
                           int64_t groups, VecF (&acc)[kM][kN]) {
    constexpr int kVecBytes = kLanes * P::kBytes;
    for (int64_t group = 0; group < groups; ++group) {
      Fetch<kM, kN, kVecBytes>(fetch);
      VecF v[kN];
      for (int i = 0; i < kN; ++i) {
        v[i] = LoadPairs(values + VecOffset(i, kVecBytes, ValuePanelBytes<P>()));
      }
      for (int r = 0; r < kM; ++r) {
        const VecF x = Broadcast2(weights + r * kStepStride * 4);
        for (int i = 0; i < kN; ++i) acc[r][i] = Dot(acc[r][i], x, v[i]);
      }
      weights += 4;
      values += kPanelWidth * P::kBytes;
      fetch += kPanelWidth * P::kBytes;
    }
  }
};
