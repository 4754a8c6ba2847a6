// Vectors of the unit's width over GCC's and Clang's vector extensions, and loads and stores of
// each element type. Included once by each isa_<isa>.cc inside its own namespace, after
// ATTN_VEC_BYTES; compiler builtins stand in for headers, whose inline functions would leak out of
// the unit.

constexpr int kLanes = ATTN_VEC_BYTES / 4;

typedef float VecF __attribute__((vector_size(ATTN_VEC_BYTES)));
typedef int32_t VecI __attribute__((vector_size(ATTN_VEC_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(ATTN_VEC_BYTES)));
typedef uint16_t VecHalf __attribute__((vector_size(ATTN_VEC_BYTES / 2)));

constexpr float kInfinity = __builtin_inff();

inline bool IsCancelled(const bool* cancelled) {
  return cancelled != nullptr && __atomic_load_n(cancelled, __ATOMIC_RELAXED);
}

// Not VecF{} + value, which is an addition: it must keep -0.
inline VecF Broadcast(float value) {
#if ATTN_VEC_BYTES == 64
  return reinterpret_cast<VecF>(_mm512_set1_ps(value));
#elif ATTN_VEC_BYTES == 32
  return reinterpret_cast<VecF>(_mm256_set1_ps(value));
#else
  return VecF{value, value, value, value};
#endif
}

inline VecF Load(const float* from) {
  VecF v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

inline void Store(VecF v, float* to) { __builtin_memcpy(to, &v, sizeof(v)); }

#if ATTN_VEC_BYTES == 64
// By a shuffle: through memory, a sum would stay there for as long as it is added to.
inline __m256 Half(VecF v, int which) {
  typedef float Lanes8 __attribute__((vector_size(32)));
  const Lanes8 low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const Lanes8 high = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return reinterpret_cast<__m256>(which == 0 ? low : high);
}
#endif

// Both halve the vector again and again: lane i with lane i + width / 2.
inline float HorizontalSum(VecF v) {
#if ATTN_VEC_BYTES == 64
  const __m256 half = _mm256_add_ps(Half(v, 0), Half(v, 1));
#elif ATTN_VEC_BYTES == 32
  const __m256 half = reinterpret_cast<__m256>(v);
#endif
#if ATTN_VEC_BYTES >= 32
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// a > b ? a : b: b where one is NaN.
inline VecF MaxOrSecond(VecF a, VecF b) {
#if ATTN_VEC_BYTES == 64
  return reinterpret_cast<VecF>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif ATTN_VEC_BYTES == 32
  return reinterpret_cast<VecF>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// Of lanes that are not NaN.
inline float HorizontalMax(VecF v) {
#if ATTN_VEC_BYTES == 64
  const __m256 half = _mm256_max_ps(Half(v, 0), Half(v, 1));
#elif ATTN_VEC_BYTES == 32
  const __m256 half = reinterpret_cast<__m256>(v);
#endif
#if ATTN_VEC_BYTES >= 32
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
#else
  const float a = v[0] > v[2] ? v[0] : v[2];
  const float b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
#endif
}

inline uint32_t BitsOf(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float FloatOf(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// float16 is float32 with a short exponent: shifted into place it is off by 2^112, which a
// multiplication mends for normal and subnormal numbers alike; infinities and NaNs get their
// exponent back.
inline float WidenFloat16(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return FloatOf(BitsOf(FloatOf(magnitude) * 0x1p112f) | special | (half & 0x8000u) << 16);
}

inline float WidenBFloat16(uint16_t half) { return FloatOf(static_cast<uint32_t>(half) << 16); }

// To nearest, ties to even; a NaN stays one.
inline uint16_t NarrowBFloat16(float value) {
  const uint32_t bits = BitsOf(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline uint16_t NarrowFloat16(float value) {
  const uint32_t bits = BitsOf(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  // From 65520 on the nearest multiple is 65536 or more: infinity.
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits.
    return static_cast<uint16_t>(sign | (BitsOf(FloatOf(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline uint16_t LoadHalf(const uint16_t* from) {
  uint16_t half;
  __builtin_memcpy(&half, from, sizeof(half));
  return half;
}

inline VecHalf LoadHalves(const uint16_t* from) {
  VecHalf halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  return halves;
}

inline VecF WidenFloat16(VecHalf halves) {
#if ATTN_VEC_BYTES == 64
  // The unmasked form starts from an undefined register, which GCC 12 warns of.
  return reinterpret_cast<VecF>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(halves)));
#elif ATTN_VEC_BYTES == 32
  return reinterpret_cast<VecF>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(halves)));
#else
  const VecU half = __builtin_convertvector(halves, VecU);
  const VecF magnitude = reinterpret_cast<VecF>((half & 0x7fffu) << 13) * 0x1p112f;
  const VecU special = reinterpret_cast<VecU>((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return reinterpret_cast<VecF>(reinterpret_cast<VecU>(magnitude) | special |
                                (half & 0x8000u) << 16);
#endif
}

// Reads elements of one type as float32.
template <ElementType kType>
struct Elements;

template <>
struct Elements<ElementType::kFloat32> {
  typedef float Type;
  static inline VecF LoadVec(const float* from) { return Load(from); }
  static inline float LoadOne(const float* from) {
    float value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  }
};

template <>
struct Elements<ElementType::kBFloat16> {
  typedef uint16_t Type;
  static inline VecF LoadVec(const uint16_t* from) {
    return reinterpret_cast<VecF>(__builtin_convertvector(LoadHalves(from), VecU) << 16);
  }
  static inline float LoadOne(const uint16_t* from) { return WidenBFloat16(LoadHalf(from)); }
};

template <>
struct Elements<ElementType::kFloat16> {
  typedef uint16_t Type;
  static inline VecF LoadVec(const uint16_t* from) { return WidenFloat16(LoadHalves(from)); }
  static inline float LoadOne(const uint16_t* from) { return WidenFloat16(LoadHalf(from)); }
};

// The first `count` <= kLanes elements; the lanes beyond are zero and their memory is not touched.
template <ElementType kType>
inline VecF LoadFirst(const typename Elements<kType>::Type* from, int64_t count) {
  if (count == kLanes) return Elements<kType>::LoadVec(from);
  float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = Elements<kType>::LoadOne(from + i);
  return Load(values);
}

// The bfloat16 of each lane in the lane's upper half; the lower half is not zero.
inline VecU RoundToUpperHalf(VecF v) {
  const VecU bits = reinterpret_cast<VecU>(v);
  return v == v ? bits + 0x7fffu + (bits >> 16 & 1u) : bits | 0x400000u;
}

inline VecHalf NarrowFloat16(VecF v) {
#if ATTN_VEC_BYTES == 64
  return reinterpret_cast<VecHalf>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif ATTN_VEC_BYTES == 32
  return reinterpret_cast<VecHalf>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  VecHalf halves;
  for (int i = 0; i < kLanes; ++i) halves[i] = NarrowFloat16(static_cast<float>(v[i]));
  return halves;
#endif
}

// Writes the first `count` <= kLanes lanes as elements [at, at + count) of `to`, rounded to nearest
// even.
inline void StoreFirst(VecF v, int64_t count, ElementType type, void* to, int64_t at) {
  const size_t bytes = static_cast<size_t>(count) * (type == ElementType::kFloat32 ? 4 : 2);
  char* const out = static_cast<char*>(to) + at * (type == ElementType::kFloat32 ? 4 : 2);
  VecHalf halves = {};
  const void* from = &v;
  if (type == ElementType::kFloat16) {
    halves = NarrowFloat16(v);
    from = &halves;
  } else if (type == ElementType::kBFloat16) {
    halves = __builtin_convertvector(RoundToUpperHalf(v) >> 16, VecHalf);
    from = &halves;
  }
  if (count < kLanes) {
    __builtin_memcpy(out, from, bytes);
  } else if (type == ElementType::kFloat32) {
    __builtin_memcpy(out, &v, sizeof(v));
  } else {
    __builtin_memcpy(out, &halves, sizeof(halves));
  }
}
