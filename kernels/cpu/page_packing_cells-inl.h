// Rows turned into columns: a part of page_packing-inl.h, which includes it. A cell is 32 bits of a
// row, one float32 or two halves.

constexpr int64_t kUnitCells = 4;
constexpr int64_t kCellBytes = 4;

// 16 bytes of each kLanes / 4 rows, `row_step` bytes apart: four cells of a row in each 128 bits.
inline VecU LoadCells(const char* from, int64_t row_step) {
#if ATTN_VEC_BYTES == 64
  const auto load = [&](int64_t i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * row_step));
  };
  // Masked forms, as in WidenFloat16.
  __m512i v = _mm512_castsi128_si512(load(0));
  v = _mm512_maskz_inserti32x4(0xffff, v, load(1), 1);
  v = _mm512_maskz_inserti32x4(0xffff, v, load(2), 2);
  v = _mm512_maskz_inserti32x4(0xffff, v, load(3), 3);
  return reinterpret_cast<VecU>(v);
#elif ATTN_VEC_BYTES == 32
  const auto load = [&](int64_t i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * row_step));
  };
  return reinterpret_cast<VecU>(
      _mm256_inserti128_si256(_mm256_castsi128_si256(load(0)), load(1), 1));
#else
  static_cast<void>(row_step);
  VecU v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
#endif
}

// Which lanes of two vectors are taken: pairs interleaved within 128 bits, as one shuffle does it.
#define ATTN_LOW_CELLS(l) l, kLanes + l, l + 1, kLanes + l + 1
#define ATTN_HIGH_CELLS(l) l + 2, kLanes + l + 2, l + 3, kLanes + l + 3
#define ATTN_LOW_PAIRS(l) l, l + 1, kLanes + l, kLanes + l + 1
#define ATTN_HIGH_PAIRS(l) l + 2, l + 3, kLanes + l + 2, kLanes + l + 3
#if ATTN_VEC_BYTES == 64
#define ATTN_LANES(of) of(0), of(4), of(8), of(12)
#elif ATTN_VEC_BYTES == 32
#define ATTN_LANES(of) of(0), of(4)
#else
#define ATTN_LANES(of) of(0)
#endif

// Each 128 bits of the four vectors are a matrix of 4 x 4 cells, which is transposed.
[[gnu::always_inline]] inline void TransposeCells(VecU (&v)[4]) {
  const VecU low01 = __builtin_shufflevector(v[0], v[1], ATTN_LANES(ATTN_LOW_CELLS));
  const VecU high01 = __builtin_shufflevector(v[0], v[1], ATTN_LANES(ATTN_HIGH_CELLS));
  const VecU low23 = __builtin_shufflevector(v[2], v[3], ATTN_LANES(ATTN_LOW_CELLS));
  const VecU high23 = __builtin_shufflevector(v[2], v[3], ATTN_LANES(ATTN_HIGH_CELLS));
  v[0] = __builtin_shufflevector(low01, low23, ATTN_LANES(ATTN_LOW_PAIRS));
  v[1] = __builtin_shufflevector(low01, low23, ATTN_LANES(ATTN_HIGH_PAIRS));
  v[2] = __builtin_shufflevector(high01, high23, ATTN_LANES(ATTN_LOW_PAIRS));
  v[3] = __builtin_shufflevector(high01, high23, ATTN_LANES(ATTN_HIGH_PAIRS));
}

#undef ATTN_LOW_CELLS
#undef ATTN_HIGH_CELLS
#undef ATTN_LOW_PAIRS
#undef ATTN_HIGH_PAIRS
#undef ATTN_LANES

// kUnitCells cells of kLanes rows, `stride` bytes apart: a vector for each cell.
[[gnu::always_inline]] inline void LoadKeyCells(const char* from, int64_t stride,
                                                VecU (&cells)[kUnitCells]) {
  for (int64_t i = 0; i < kUnitCells; ++i) cells[i] = LoadCells(from + i * stride, 4 * stride);
  TransposeCells(cells);
}
