// Tokens into pages of int8 and back: a part of page_packing-inl.h, which includes it. A token's
// key, and its value, is quantised by itself (page_packing.h says how), so that it has the same
// bits whatever is appended with it.

constexpr float kLargestInt8 = 127.0f;
constexpr float kLargestScale = 0x1.020406p121f;  // of which 127 times is still a number

// The largest magnitude / 127. Magnitudes order as integers do, infinities and NaNs above all
// numbers: where there is one, the scale is NaN.
template <ElementType kFrom>
inline float TokenScale(const typename Elements<kFrom>::Type* from, int64_t count) {
  VecI largest = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const VecI bits = reinterpret_cast<VecI>(Elements<kFrom>::LoadVec(from + i)) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  uint32_t all = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto bits = static_cast<uint32_t>(largest[lane]);
    if (bits > all) all = bits;
  }
  for (; i < count; ++i) {
    const uint32_t bits = BitsOf(Elements<kFrom>::LoadOne(from + i)) & 0x7fffffffu;
    if (bits > all) all = bits;
  }
  if (all >= 0x7f800000u) return __builtin_nanf("");
  const float scale = FloatOf(all) / kLargestInt8;
  return scale < kLargestScale ? scale : kLargestScale;
}

// What a token is divided by: a scale of 0, of zeros and of numbers too small to have one, makes
// zeros. Of what is divided by NaN only the scale matters.
inline float DivisorOf(float scale) { return scale == 0.0f ? kInfinity : scale; }

// To nearest even: in the last bits of a sum whose unit in the last place is 1. The smallest scales
// are so coarse, and the largest is so near to the largest number, that a quotient may pass 127.
constexpr float kRounder = 0x1.8p23f;

inline VecI Quantise(VecF v, VecF divisor) {
  const VecF quotient = v / divisor;
  const VecF above = quotient > -kLargestInt8 ? quotient : Broadcast(-kLargestInt8);
  const VecF within = above < kLargestInt8 ? above : Broadcast(kLargestInt8);
  return reinterpret_cast<VecI>(within + kRounder) - static_cast<int32_t>(BitsOf(kRounder));
}

inline int8_t QuantiseOne(float value, float divisor) {
  const float quotient = value / divisor;
  const float above = quotient > -kLargestInt8 ? quotient : -kLargestInt8;
  const float within = above < kLargestInt8 ? above : kLargestInt8;
  return static_cast<int8_t>(static_cast<int32_t>(BitsOf(within + kRounder)) -
                             static_cast<int32_t>(BitsOf(kRounder)));
}

inline void StoreScale(float scale, char* to) { __builtin_memcpy(to, &scale, sizeof(scale)); }

inline float LoadScale(const char* from) {
  float scale;
  __builtin_memcpy(&scale, from, sizeof(scale));
  return scale;
}

// A page's places, of which the compiler knows the dtype.
inline PageLayout Int8Places(const PageLayout& layout) {
  return {ElementType::kInt8, layout.head_dim, layout.value_dim};
}

// Four vectors of quotients' numerators as the bytes of one, the first in the lowest bytes.
inline VecU QuantiseFour(const VecF (&v)[4], const VecF (&divisors)[4]) {
  VecU bytes = {};
  for (int i = 0; i < 4; ++i) {
    bytes |= (reinterpret_cast<VecU>(Quantise(v[i], divisors[i])) & 0xffu) << (8 * i);
  }
  return bytes;
}

// kUnitCells cells of kLanes rows, `stride` bytes apart, to the first token's and dimension's
// place.
template <ElementType kFrom>
[[gnu::always_inline]] inline void PackInt8KeyUnit(const char* from, int64_t stride, VecF divisor,
                                                   char* to) {
  constexpr int64_t kNextGroup = PageLayout{ElementType::kInt8}.KeyElement(0, 4);
  const VecF divisors[4] = {divisor, divisor, divisor, divisor};
  VecU cells[kUnitCells];
  LoadKeyCells(from, stride, cells);
  if constexpr (kFrom == ElementType::kFloat32) {
    const VecF group[4] = {reinterpret_cast<VecF>(cells[0]), reinterpret_cast<VecF>(cells[1]),
                           reinterpret_cast<VecF>(cells[2]), reinterpret_cast<VecF>(cells[3])};
    StoreVec(QuantiseFour(group, divisors), to);
  } else {
    for (int64_t i = 0; i < 2; ++i) {
      const VecF group[4] = {EvenOfCell<kFrom>(cells[2 * i]), OddOfCell<kFrom>(cells[2 * i]),
                             EvenOfCell<kFrom>(cells[2 * i + 1]),
                             OddOfCell<kFrom>(cells[2 * i + 1])};
      StoreVec(QuantiseFour(group, divisors), to + i * kNextGroup);
    }
  }
}

// Dimensions from d on of one token, one by one; zeros beyond head_dim.
template <ElementType kFrom>
inline void PackInt8KeyElements(const PageLayout& places,
                                const typename Elements<kFrom>::Type* from, int64_t d,
                                float divisor, char* to) {
  for (; d < places.head_dim; ++d) {
    to[places.KeyElement(0, d)] = QuantiseOne(Elements<kFrom>::LoadOne(from + d), divisor);
  }
  for (; d < places.padded_head_dim(); ++d) to[places.KeyElement(0, d)] = 0;
}

// `page` is where the keys begin.
template <ElementType kFrom>
void PackInt8Keys(const PageLayout& layout, const cpu::TokenRows& rows, cpu::PageRange range,
                  void* page) {
  using From = typename Elements<kFrom>::Type;
  constexpr int64_t kUnitDims = kUnitCells * kCellBytes / static_cast<int64_t>(sizeof(From));
  const PageLayout places = Int8Places(layout);
  const int64_t stride = rows.key_stride * static_cast<int64_t>(sizeof(From));
  char* const keys = static_cast<char*>(page);
  for (int64_t t = 0; t < range.count;) {
    const From* const from = static_cast<const From*>(rows.key) + t * rows.key_stride;
    const int64_t token = range.first + t;
    const int64_t tokens = token % kLanes == 0 && range.count - t >= kLanes ? kLanes : 1;
    char* const to = keys + places.KeyElement(token, 0);
    float divisors[kLanes] = {};
    for (int64_t i = 0; i < tokens; ++i) {
      const float scale = TokenScale<kFrom>(from + i * rows.key_stride, places.head_dim);
      StoreScale(scale, keys + places.KeyScale(token + i));
      divisors[i] = DivisorOf(scale);
    }
    int64_t d = 0;
    if (tokens == kLanes) {
      for (; d + kUnitDims <= places.head_dim; d += kUnitDims) {
        PackInt8KeyUnit<kFrom>(reinterpret_cast<const char*>(from + d), stride, Load(divisors),
                               to + places.KeyElement(0, d));
      }
    }
    for (int64_t i = 0; i < tokens; ++i) {
      PackInt8KeyElements<kFrom>(places, from + i * rows.key_stride, d, divisors[i],
                                 to + places.KeyElement(i, 0));
    }
    t += tokens;
  }
}

// The values of four tokens that lie side by side; `to` is the first one's place.
template <ElementType kFrom>
inline void PackInt8ValueGroup(const PageLayout& places, const typename Elements<kFrom>::Type* from,
                               int64_t stride, const float (&divisors)[4], char* to) {
  const VecF vectors[4] = {Broadcast(divisors[0]), Broadcast(divisors[1]), Broadcast(divisors[2]),
                           Broadcast(divisors[3])};
  int64_t c = 0;
  for (; c + kLanes <= places.value_dim; c += kLanes) {
    const VecF group[4] = {Elements<kFrom>::LoadVec(from + c),
                           Elements<kFrom>::LoadVec(from + stride + c),
                           Elements<kFrom>::LoadVec(from + 2 * stride + c),
                           Elements<kFrom>::LoadVec(from + 3 * stride + c)};
    StoreVec(QuantiseFour(group, vectors), to + places.ValueElement(0, c));
  }
  for (; c < places.padded_value_dim(); ++c) {
    for (int64_t t = 0; t < 4; ++t) {
      to[places.ValueElement(t, c)] =
          c < places.value_dim
              ? QuantiseOne(Elements<kFrom>::LoadOne(from + t * stride + c), divisors[t])
              : static_cast<char>(0);
    }
  }
}

// `start` is where the values begin.
template <ElementType kFrom>
void PackInt8Values(const PageLayout& layout, const cpu::TokenRows& rows, cpu::PageRange range,
                    void* start) {
  const PageLayout places = Int8Places(layout);
  char* const values = static_cast<char*>(start);
  for (int64_t t = 0; t < range.count;) {
    const auto* const from =
        static_cast<const typename Elements<kFrom>::Type*>(rows.value) + t * rows.value_stride;
    const int64_t token = range.first + t;
    const bool whole = token % places.group() == 0 && t + places.group() <= range.count;
    const int64_t tokens = whole ? places.group() : 1;
    float divisors[4] = {};
    for (int64_t i = 0; i < tokens; ++i) {
      const float scale = TokenScale<kFrom>(from + i * rows.value_stride, places.value_dim);
      StoreScale(scale, values + places.ValueScale(token + i));
      divisors[i] = DivisorOf(scale);
    }
    char* const to = values + places.ValueElement(token, 0);
    if (whole) {
      PackInt8ValueGroup<kFrom>(places, from, rows.value_stride, divisors, to);
    } else {
      for (int64_t c = 0; c < places.value_dim; ++c) {
        to[places.ValueElement(0, c)] =
            QuantiseOne(Elements<kFrom>::LoadOne(from + c), divisors[0]);
      }
      for (int64_t c = places.value_dim; c < places.padded_value_dim(); ++c) {
        to[places.ValueElement(0, c)] = 0;
      }
    }
    t += tokens;
  }
}

// Into rows of float32.
inline void UnpackInt8(const PageLayout& layout, const void* page, cpu::PageRange range,
                       const cpu::MutableTokenRows& rows) {
  const PageLayout places = Int8Places(layout);
  const char* const keys = static_cast<const char*>(page);
  const char* const values = keys + places.value_offset();
  const auto element = [](const char* from) {
    return static_cast<float>(static_cast<signed char>(*from));
  };
  for (int64_t t = 0; t < range.count; ++t) {
    const int64_t token = range.first + t;
    const float key_scale = LoadScale(keys + places.KeyScale(token));
    const char* const key = keys + places.KeyElement(token, 0);
    float* const key_row = static_cast<float*>(rows.key) + t * rows.key_stride;
    for (int64_t d = 0; d < places.head_dim; ++d) {
      key_row[d] = element(key + places.KeyElement(0, d)) * key_scale;
    }
    const float value_scale = LoadScale(values + places.ValueScale(token));
    const char* const value = values + places.ValueElement(token, 0);
    float* const value_row = static_cast<float*>(rows.value) + t * rows.value_stride;
    for (int64_t c = 0; c < places.value_dim; ++c) {
      value_row[c] = element(value + places.ValueElement(0, c)) * value_scale;
    }
  }
}
