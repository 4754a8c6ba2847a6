// The products of flash_tile-inl.h over pages of int8 with integers: rows of queries, and a step's
// weights, are rounded to int16 and a float for each row, and pairs of products are added in int32
// (vpmaddwd), where nothing is rounded: the order does not matter. Three instructions take 32
// products; widening int8 to float32 takes four for 8. Included after flash_tile-inl.h and
// page_packing-inl.h; units of narrow vectors, whose baseline lacks the widening load, keep
// float32.

#if ATTN_VEC_BYTES >= 32
// Magnitudes go up to this. A step's products then add up to less than 2^31.
constexpr int32_t kLargestInt16 = 32767;
static_assert(int64_t{kStepKeys} * kLargestInt16 * 127 < int64_t{1} << 31, "weights");

// For a row whose largest magnitude has these bits; below it, numbers count as zeros. Infinities
// and NaNs make NaN, which the row's results become.
inline float RowScale(uint32_t bits, int64_t largest) {
  if (bits >= 0x7f800000u) return __builtin_nanf("");
  const float scale = FloatOf(bits) / static_cast<float>(largest);
  return scale > 0x1p-126f ? scale : 0x1p-126f;
}
inline float InverseOf(float scale) { return scale == scale ? 1.0f / scale : 0.0f; }

// Quotients of at most kLargestInt16, to nearest even; of NaN any number.
inline VecI RoundToInt(VecF v) {
  return reinterpret_cast<VecI>(v + kRounder) - static_cast<int32_t>(BitsOf(kRounder));
}
inline int16_t RoundToInt16(float v) {
  const auto rounded = static_cast<int32_t>(BitsOf(v + kRounder) - BitsOf(kRounder));
  return static_cast<int16_t>(rounded);
}

// kLanes / 2 keys or columns of four int8 each, as int16.
inline VecI WidenQuads(const char* at) {
#if ATTN_VEC_BYTES == 64
  __m256i bytes;
  __builtin_memcpy(&bytes, at, sizeof(bytes));
  return reinterpret_cast<VecI>(_mm512_cvtepi8_epi16(bytes));
#else
  __m128i bytes;
  __builtin_memcpy(&bytes, at, sizeof(bytes));
  return reinterpret_cast<VecI>(_mm256_cvtepi8_epi16(bytes));
#endif
}

inline VecI BroadcastQuad(const char* at) {
  int64_t quad;
  __builtin_memcpy(&quad, at, sizeof(quad));
#if ATTN_VEC_BYTES == 64
  return reinterpret_cast<VecI>(_mm512_set1_epi64(quad));
#else
  return reinterpret_cast<VecI>(_mm256_set1_epi64x(quad));
#endif
}

// Two sums of pairs for each quad.
inline VecI DotPairs(VecI a, VecI b) {
#if ATTN_VEC_BYTES == 64
  return reinterpret_cast<VecI>(
      _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
  return reinterpret_cast<VecI>(
      _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#endif
}

// Neighbours added: one sum for each quad, in order.
inline VecI AddNeighbours(VecI low, VecI high) {
#if ATTN_VEC_BYTES == 64
  return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28,
                                 30) +
         __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29,
                                 31);
#else
  const __m256i sums =
      _mm256_hadd_epi32(reinterpret_cast<__m256i>(low), reinterpret_cast<__m256i>(high));
  return reinterpret_cast<VecI>(_mm256_permute4x64_epi64(sums, 0xd8));
#endif
}

inline VecI LoadInts(const void* from) {
  VecI v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
inline void StoreInts(VecI v, void* to) { __builtin_memcpy(to, &v, sizeof(v)); }

// One expression for all who add a step's product, so that they round alike.
inline VecF AddScaled(VecF sum, VecI product, float scale) {
  const VecF number = __builtin_convertvector(product, VecF);
#if ATTN_VEC_BYTES == 64
  return reinterpret_cast<VecF>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(number), _mm512_set1_ps(scale), reinterpret_cast<__m512>(sum)));
#else
  return reinterpret_cast<VecF>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(number), _mm256_set1_ps(scale), reinterpret_cast<__m256>(sum)));
#endif
}

struct Int8Products {
  typedef Panel<ElementType::kInt8> P;
  static constexpr ElementType kPageType = ElementType::kInt8;
  static constexpr int kDepth = 4;
  static constexpr int kOperandBytes = 2;
  static constexpr int64_t kVecBytes = kLanes * P::kBytes;
  // A block begins with its rows' scales: whole quads, so that none crosses a line.
  static constexpr int64_t kScaleBytes = kBlockRows * 4;
  static_assert(kScaleBytes % 8 == 0, "quads are aligned");

  // Vectors of keys or columns at once: two accumulators each for every row.
  static constexpr int Together(int rows, int vecs) {
    return vecs % 2 == 0 && 4 * rows <= (kLanes == 16 ? 24 : 12) ? 2 : 1;
  }

  // Quads of dimensions, rows interleaved: [groups][kBlockRows][4].
  static inline char* QueryAt(char* block, int64_t d, int64_t row) {
    return block + kScaleBytes + ((d / 4 * kBlockRows + row) * 4 + d % 4) * 2;
  }
  static inline float GetScale(const char* block, int64_t row) {
    return LoadScale(block + row * 4);
  }
  static inline void SetScale(char* block, int64_t row, float scale) {
    StoreScale(scale, block + row * 4);
  }

  // Rounds with the row's scale, which is there already.
  static inline void SetQuery(char* block, int64_t d, int row, float value) {
    const int16_t rounded = RoundToInt16(value * InverseOf(GetScale(block, row)));
    __builtin_memcpy(QueryAt(block, d, row), &rounded, sizeof(rounded));
  }
  static inline float GetQuery(const char* block, int64_t d, int row) {
    int16_t rounded;
    __builtin_memcpy(&rounded, QueryAt(const_cast<char*>(block), d, row), sizeof(rounded));
    return static_cast<float>(rounded) * GetScale(block, row);
  }

  // The magnitude that queries go up to, so that their products with keys add up to less than 2^31.
  static constexpr int64_t LargestQuery(int64_t padded_dim) {
    const int64_t most = ((int64_t{1} << 31) - 1) / (127 * padded_dim);
    return most < kLargestInt16 ? most : kLargestInt16;
  }

  // A row of queries, zeros behind it.
  template <ElementType kType>
  static void PackRow(const typename Elements<kType>::Type* from, int64_t dim, int64_t padded_dim,
                      int64_t row, char* block) {
    uint32_t largest = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const uint32_t bits = BitsOf(Elements<kType>::LoadOne(from + d)) & 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
    const float scale = RowScale(largest, LargestQuery(padded_dim));
    const float inverse = InverseOf(scale);
    SetScale(block, row, scale);
    for (int64_t d = 0; d < padded_dim; d += 4) {
      int16_t quad[4] = {};
      for (int64_t i = 0; i < 4 && d + i < dim; ++i) {
        quad[i] = RoundToInt16(Elements<kType>::LoadOne(from + d + i) * inverse);
      }
      __builtin_memcpy(QueryAt(block, d, row), quad, sizeof(quad));
    }
  }

  // sums[r][i]: kM rows of quads, `row_bytes` apart, times kN vectors of keys or columns, panels
  // `panel_bytes` apart. kFetch: bytes of what comes next in memory, to be asked for on the way.
  template <int kM, int kN, int kFetch>
  [[gnu::always_inline]] static inline void Accumulate(const char* rows, int64_t row_bytes,
                                                       int64_t group_bytes, const char* from,
                                                       int64_t panel_bytes, const char* fetch,
                                                       int64_t groups, VecI (&acc)[kM][2 * kN]) {
    for (int64_t group = 0; group < groups; ++group) {
      if constexpr (kFetch > 0) {
        for (int at = 0; at < kFetch; at += 64) __builtin_prefetch(fetch + at);
        fetch += kPanelWidth * P::kBytes;
      }
      for (int i = 0; i < kN; ++i) {
        const char* const at = from + VecOffset(i, kVecBytes, panel_bytes);
        const VecI low = WidenQuads(at);
        const VecI high = WidenQuads(at + kVecBytes / 2);
        for (int r = 0; r < kM; ++r) {
          const VecI x = BroadcastQuad(rows + r * row_bytes);
          acc[r][2 * i] += DotPairs(low, x);
          acc[r][2 * i + 1] += DotPairs(high, x);
        }
      }
      rows += group_bytes;
      from += kPanelWidth * P::kBytes;
    }
  }

  // Loaded, as in StartBlock.
  template <int kM, int kN>
  [[gnu::always_inline]] static inline void Clear(VecI (&acc)[kM][2 * kN]) {
    for (int r = 0; r < kM; ++r) {
      for (int i = 0; i < 2 * kN; ++i) acc[r][i] = LoadInts(kZeros + i % kN * kLanes);
    }
  }

  // The first of a block's parts reads its panels, which are small, from further than the others
  // do: it alone asks for what comes next.
  template <int kM, int kN>
  static constexpr int FetchBytes(int part) {
    return part == 0 && kN <= kVecsPerPanel ? kN * static_cast<int>(kVecBytes) : 0;
  }

  template <int kM, int kN, int kAt>
  [[gnu::always_inline]] static inline void ScorePart(const char* query, const char* keys,
                                                      const char* fetch, int64_t groups,
                                                      int64_t panel_bytes, float* scores) {
    constexpr int kPart = Together(kM, kN);
    VecI acc[kM][2 * kPart];
    Clear<kM, kPart>(acc);
    Accumulate<kM, kPart, FetchBytes<kM, kN>(kAt)>(query + kScaleBytes, 8, kBlockRows * 8,
                                                   keys + VecOffset(kAt, kVecBytes, panel_bytes),
                                                   panel_bytes, fetch, groups, acc);
    for (int r = 0; r < kM; ++r) {
      const VecF scale = Broadcast(GetScale(query, r));
      for (int i = 0; i < kPart; ++i) {
        const VecI sum = AddNeighbours(acc[r][2 * i], acc[r][2 * i + 1]);
        Store(__builtin_convertvector(sum, VecF) * scale,
              scores + r * kStepStride + (kAt + i) * kLanes);
      }
    }
    if constexpr (kAt + kPart < kN) {
      ScorePart<kM, kN, kAt + kPart>(query, keys, fetch, groups, panel_bytes, scores);
    }
  }

  template <int kM, int kN>
  [[gnu::noinline]] static void Score(const char* query, const char* keys, const char* fetch,
                                      int64_t groups, int64_t panel_bytes, float* scores) {
    ScorePart<kM, kN, 0>(query, keys, fetch, groups, panel_bytes, scores);
  }

  // Weights stay float32 until they have met their values' scales.
  static inline void SetWeights(VecF p, float* row, int64_t column) { Store(p, row + column); }

  // The weights of columns [first, last) to int16, in the first half of the row; behind all columns
  // lies their scale. `largest`: bits of magnitudes.
  static inline void RoundWeights(int64_t first, int64_t last, VecI largest, float* row) {
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto of_lane = static_cast<uint32_t>(largest[lane]);
      bits = of_lane > bits ? of_lane : bits;
    }
    const float scale = RowScale(bits, kLargestInt16);
    const float inverse = InverseOf(scale);
    row[kStepKeys] = scale;
    for (int64_t j = first; j < last; j += kLanes) {
      const VecI rounded = RoundToInt(Load(row + j) * inverse);
      char* const to = reinterpret_cast<char*>(row) + j * 2;
#if ATTN_VEC_BYTES == 64
      const auto halves = __builtin_convertvector(rounded, VecHalf);
#else
      const auto both = reinterpret_cast<__m256i>(rounded);
      const __m128i halves =
          _mm_packs_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
#endif
      __builtin_memcpy(to, &halves, sizeof(halves));
    }
  }
  static inline float WeightScale(const char* weights) {
    return LoadScale(weights + kStepKeys * 4);
  }

  // What flash_tile-inl.h's ValueBlock does: `out` holds int32 until it is added to an output.
  template <int kM, int kN, int kAt>
  [[gnu::always_inline]] static inline void WeighPart(const char* weights, const StepValues& values,
                                                      int64_t column, int64_t fetch, Add add,
                                                      float* out, int64_t out_stride) {
    constexpr int kPart = Together(kM, kN);
    constexpr int64_t kPanelBytes = ValuePanelBytes<P>();
    VecI acc[kM][2 * kPart];
    Clear<kM, kPart>(acc);
    for (int64_t at = values.begin; at < values.end;) {
      const int64_t page_end = (at / kPageTokens + 1) * kPageTokens;
      const int64_t end = page_end < values.end ? page_end : values.end;
      const char* const from = ValuesAt<P>(values, at, column);
      Accumulate<kM, kPart, FetchBytes<kM, kN>(kAt)>(
          weights + at * kOperandBytes, kStepStride * 4, 8,
          from + VecOffset(kAt, kVecBytes, kPanelBytes), kPanelBytes, from + fetch, (end - at) / 4,
          acc);
      at = end;
    }
    for (int r = 0; r < kM; ++r) {
      for (int i = 0; i < kPart; ++i) {
        const VecI sum = AddNeighbours(acc[r][2 * i], acc[r][2 * i + 1]);
        float* const to = out + r * out_stride + (kAt + i) * kLanes;
        if (add == Add::kToOutput) {
          Store(AddScaled(Load(to), sum, WeightScale(weights + r * kStepStride * 4)), to);
        } else {
          StoreInts(add == Add::kToSum ? LoadInts(to) + sum : sum, to);
        }
      }
    }
    if constexpr (kAt + kPart < kN) {
      WeighPart<kM, kN, kAt + kPart>(weights, values, column, fetch, add, out, out_stride);
    }
  }

  template <int kM, int kN>
  [[gnu::noinline]] static void ValueBlock(const char* weights, const StepValues& values,
                                           int64_t column, int64_t fetch, Add add, float* out,
                                           int64_t out_stride) {
    WeighPart<kM, kN, 0>(weights, values, column, fetch, add, out, out_stride);
  }

  // One row's finished product to its output.
  static inline void AddProduct(const char* weights, const float* product, int64_t columns,
                                float* output) {
    const float scale = WeightScale(weights);
    for (int64_t c = 0; c < columns; c += kLanes) {
      Store(AddScaled(Load(output + c), LoadInts(product + c), scale), output + c);
    }
  }
};

template <>
constexpr bool kScalesRows<Int8Products> = true;
typedef Int8Products ProductsOfInt8;
#else
typedef Widened<ElementType::kInt8> ProductsOfInt8;
#endif
