// The text of page_packing.h, after vec-inl.h. Keys are transposed with shuffles, the lanes' width
// of tokens and 16 bytes of each row at a time; dimensions and tokens that fill no such unit move
// one by one. What a vector and a loop over elements make of the same number is the same number.

// Tokens and 32-bit cells (one float32 or two halves of a row) that are transposed together: whole
// cache lines of both sides.
constexpr int64_t kTileTokens = 16;
constexpr int64_t kTileCells = 16;

#include "kernels/cpu/page_packing_cells-inl.h"

// One element from one type to another; equal types keep their bits.
template <ElementType kFrom, ElementType kTo>
inline typename Elements<kTo>::Type ConvertOne(const typename Elements<kFrom>::Type* from) {
  if constexpr (kFrom == kTo) {
    typename Elements<kTo>::Type value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  } else if constexpr (kTo == ElementType::kFloat32) {
    return Elements<kFrom>::LoadOne(from);
  } else if constexpr (kTo == ElementType::kFloat16) {
    return NarrowFloat16(Elements<kFrom>::LoadOne(from));
  } else {
    return NarrowBFloat16(Elements<kFrom>::LoadOne(from));
  }
}

template <typename Vec>
inline void StoreVec(Vec v, void* to) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// Two dimensions d, d + 1 (d even) of kLanes tokens.
template <ElementType kTo>
[[gnu::always_inline]] inline void StoreKeyPair(VecF even, VecF odd,
                                                typename Elements<kTo>::Type* to) {
  constexpr int64_t kNext = PageLayout{kTo}.KeyElement(0, 1);
  if constexpr (kTo == ElementType::kFloat32) {
    StoreVec(even, to);
    StoreVec(odd, to + kNext);
  } else if constexpr (kTo == ElementType::kFloat16) {
    StoreVec(NarrowFloat16(even), to);
    StoreVec(NarrowFloat16(odd), to + kNext);
  } else {
    StoreVec(RoundToUpperHalf(even) >> 16 | (RoundToUpperHalf(odd) & 0xffff0000u), to);
  }
}

// Cells hold two halves each: dimensions d (even) and d + 1 of kLanes tokens.
template <ElementType kFrom>
inline VecF EvenOfCell(VecU cell) {
  if constexpr (kFrom == ElementType::kBFloat16) return reinterpret_cast<VecF>(cell << 16);
  return WidenFloat16(__builtin_convertvector(cell & 0xffffu, VecHalf));
}
template <ElementType kFrom>
inline VecF OddOfCell(VecU cell) {
  if constexpr (kFrom == ElementType::kBFloat16) return reinterpret_cast<VecF>(cell & 0xffff0000u);
  return WidenFloat16(__builtin_convertvector(cell >> 16, VecHalf));
}

template <ElementType kFrom, ElementType kTo>
[[gnu::always_inline]] inline void StoreKeyCell(VecU cell, typename Elements<kTo>::Type* to) {
  if constexpr (kFrom != kTo) {
    StoreKeyPair<kTo>(EvenOfCell<kFrom>(cell), OddOfCell<kFrom>(cell), to);
  } else if constexpr (kTo == ElementType::kBFloat16) {
    StoreVec(cell, to);
  } else {
    StoreVec(__builtin_convertvector(cell & 0xffffu, VecHalf), to);
    StoreVec(__builtin_convertvector(cell >> 16, VecHalf), to + PageLayout{kTo}.KeyElement(0, 1));
  }
}

// kUnitCells cells of kLanes rows, `stride` bytes apart.
template <ElementType kFrom, ElementType kTo>
[[gnu::always_inline]] inline void PackKeyUnit(const char* from, int64_t stride,
                                               typename Elements<kTo>::Type* to) {
  constexpr int64_t kNextPair = PageLayout{kTo}.KeyElement(0, 2);
  VecU cells[kUnitCells];
  LoadKeyCells(from, stride, cells);
  if constexpr (kFrom == ElementType::kFloat32) {
    StoreKeyPair<kTo>(reinterpret_cast<VecF>(cells[0]), reinterpret_cast<VecF>(cells[1]), to);
    StoreKeyPair<kTo>(reinterpret_cast<VecF>(cells[2]), reinterpret_cast<VecF>(cells[3]),
                      to + kNextPair);
  } else {
    for (int64_t i = 0; i < kUnitCells; ++i) {
      StoreKeyCell<kFrom, kTo>(cells[i], to + i * kNextPair);
    }
  }
}

#include "kernels/cpu/page_packing_int8-inl.h"

// Dimensions [d0, head_dim) of tokens [t0, range.count), one by one.
template <ElementType kFrom, ElementType kTo>
void PackKeyElements(const PageLayout& layout, const cpu::TokenRows& rows, cpu::PageRange range,
                     int64_t t0, int64_t d0, typename Elements<kTo>::Type* keys) {
  using From = typename Elements<kFrom>::Type;
  const PageLayout places = {kTo, layout.head_dim, layout.value_dim};
  for (int64_t t = t0; t < range.count; ++t) {
    const From* const from = static_cast<const From*>(rows.key) + t * rows.key_stride;
    for (int64_t d = d0; d < places.head_dim; ++d) {
      keys[places.KeyElement(range.first + t, d)] = ConvertOne<kFrom, kTo>(from + d);
    }
    for (int64_t d = places.head_dim; d < places.padded_head_dim(); ++d) {
      keys[places.KeyElement(range.first + t, d)] = 0;
    }
  }
}

template <ElementType kFrom, ElementType kTo>
void PackKeysAs(const PageLayout& layout, const cpu::TokenRows& rows, cpu::PageRange range,
                void* page) {
  using From = typename Elements<kFrom>::Type;
  using To = typename Elements<kTo>::Type;
  constexpr int64_t kCellDims = kCellBytes / static_cast<int64_t>(sizeof(From));
  const PageLayout places = {kTo, layout.head_dim, layout.value_dim};
  const int64_t cells = layout.head_dim / kCellDims / kUnitCells * kUnitCells;
  // Vectors of tokens lie within a panel: those before and behind whole ones move one by one.
  const int64_t before = (kLanes - range.first % kLanes) % kLanes;
  const int64_t head = before < range.count ? before : range.count;
  const int64_t tokens = head + (range.count - head) / kLanes * kLanes;
  const int64_t stride = rows.key_stride * static_cast<int64_t>(sizeof(From));
  const char* const from = static_cast<const char*>(rows.key);
  To* const keys = static_cast<To*>(page);
  for (int64_t t0 = head; t0 < tokens; t0 += kTileTokens) {
    const int64_t t_end = tokens - t0 < kTileTokens ? tokens : t0 + kTileTokens;
    for (int64_t c0 = 0; c0 < cells; c0 += kTileCells) {
      const int64_t c_end = cells - c0 < kTileCells ? cells : c0 + kTileCells;
      for (int64_t t = t0; t < t_end; t += kLanes) {
        To* const to = keys + places.KeyElement(range.first + t, 0);
        for (int64_t i = 0; i < kLanes; ++i) {
          __builtin_prefetch(from + (t + kTileTokens + i) * stride + c0 * kCellBytes);
        }
        for (int64_t c = c0; c < c_end; c += kUnitCells) {
          PackKeyUnit<kFrom, kTo>(from + t * stride + c * kCellBytes, stride,
                                  to + places.KeyElement(0, c * kCellDims));
        }
      }
    }
  }
  PackKeyElements<kFrom, kTo>(layout, rows, {range.first, head}, 0, 0, keys);
  if (cells * kCellDims < places.padded_head_dim()) {
    PackKeyElements<kFrom, kTo>(layout, rows, {range.first, tokens}, head, cells * kCellDims, keys);
  }
  PackKeyElements<kFrom, kTo>(layout, rows, range, tokens, 0, keys);
}

// One token's value in pages without pairs; `to` is the place of its first column.
template <ElementType kFrom, ElementType kTo>
inline void PackValueRow(const PageLayout& places, const typename Elements<kFrom>::Type* from,
                         typename Elements<kTo>::Type* to) {
  int64_t c = 0;
  for (; c + kLanes <= places.value_dim; c += kLanes) {
    auto* const at = to + places.ValueElement(0, c);
    if constexpr (kFrom == ElementType::kFloat16 && kTo == kFrom) {
      StoreVec(LoadHalves(from + c), at);
    } else if constexpr (kTo == ElementType::kFloat16) {
      StoreVec(NarrowFloat16(Elements<kFrom>::LoadVec(from + c)), at);
    } else {
      StoreVec(Elements<kFrom>::LoadVec(from + c), at);
    }
  }
  for (; c < places.value_dim; ++c) {
    to[places.ValueElement(0, c)] = ConvertOne<kFrom, kTo>(from + c);
  }
  for (; c < places.padded_value_dim(); ++c) to[places.ValueElement(0, c)] = 0;
}

// The bfloat16 of kLanes elements, in the lanes' lower halves.
template <ElementType kFrom>
inline VecU LoadBFloat16(const typename Elements<kFrom>::Type* from) {
  if constexpr (kFrom == ElementType::kBFloat16) {
    return __builtin_convertvector(LoadHalves(from), VecU);
  } else {
    return RoundToUpperHalf(Elements<kFrom>::LoadVec(from)) >> 16;
  }
}

// The values of two tokens, the first of them even, in pairs of bfloat16.
template <ElementType kFrom>
inline void PackValuePairs(const PageLayout& places, const typename Elements<kFrom>::Type* even,
                           const typename Elements<kFrom>::Type* odd, uint16_t* to) {
  int64_t c = 0;
  for (; c + kLanes <= places.value_dim; c += kLanes) {
    StoreVec(LoadBFloat16<kFrom>(even + c) | LoadBFloat16<kFrom>(odd + c) << 16,
             to + places.ValueElement(0, c));
  }
  for (; c < places.value_dim; ++c) {
    to[places.ValueElement(0, c)] = ConvertOne<kFrom, ElementType::kBFloat16>(even + c);
    to[places.ValueElement(1, c)] = ConvertOne<kFrom, ElementType::kBFloat16>(odd + c);
  }
  for (; c < places.padded_value_dim(); ++c) {
    to[places.ValueElement(0, c)] = to[places.ValueElement(1, c)] = 0;
  }
}

template <ElementType kFrom, ElementType kTo>
void PackValuesAs(const PageLayout& layout, const cpu::TokenRows& rows, cpu::PageRange range,
                  void* start) {
  using From = typename Elements<kFrom>::Type;
  using To = typename Elements<kTo>::Type;
  const PageLayout places = {kTo, layout.head_dim, layout.value_dim};
  To* const values = static_cast<To*>(start);
  for (int64_t t = 0; t < range.count; ++t) {
    const From* const from = static_cast<const From*>(rows.value) + t * rows.value_stride;
    const int64_t token = range.first + t;
    To* const to = values + places.ValueElement(token, 0);
    if constexpr (kTo != ElementType::kBFloat16) {
      PackValueRow<kFrom, kTo>(places, from, to);
    } else if (token % 2 == 0 && t + 1 < range.count) {
      PackValuePairs<kFrom>(places, from, from + rows.value_stride, to);
      ++t;
    } else {
      for (int64_t c = 0; c < places.value_dim; ++c) {
        to[places.ValueElement(0, c)] = ConvertOne<kFrom, kTo>(from + c);
      }
      for (int64_t c = places.value_dim; c < places.padded_value_dim(); ++c) {
        to[places.ValueElement(0, c)] = 0;
      }
    }
  }
}

template <ElementType kFrom, ElementType kTo>
void UnpackAs(const PageLayout& layout, const void* page, cpu::PageRange range,
              const cpu::MutableTokenRows& rows) {
  using From = typename Elements<kFrom>::Type;
  using To = typename Elements<kTo>::Type;
  const From* const keys = static_cast<const From*>(page);
  for (int64_t t0 = 0; t0 < range.count; t0 += kTileTokens) {
    const int64_t tokens = range.count - t0 < kTileTokens ? range.count - t0 : kTileTokens;
    for (int64_t d0 = 0; d0 < layout.head_dim; d0 += kTileCells) {
      const int64_t dims = layout.head_dim - d0 < kTileCells ? layout.head_dim - d0 : kTileCells;
      for (int64_t t = 0; t < tokens; ++t) {
        To* const to = static_cast<To*>(rows.key) + (t0 + t) * rows.key_stride + d0;
        const int64_t token = range.first + t0 + t;
        for (int64_t d = 0; d < dims; ++d) {
          to[d] = ConvertOne<kFrom, kTo>(keys + layout.KeyElement(token, d0 + d));
        }
      }
    }
  }
  const From* const values =
      reinterpret_cast<const From*>(static_cast<const char*>(page) + layout.value_offset());
  for (int64_t t = 0; t < range.count; ++t) {
    To* const to = static_cast<To*>(rows.value) + t * rows.value_stride;
    for (int64_t c = 0; c < layout.value_dim; ++c) {
      to[c] = ConvertOne<kFrom, kTo>(values + layout.ValueElement(range.first + t, c));
    }
  }
}

template <ElementType kFrom>
void PackKeysFrom(const PageLayout& layout, const cpu::TokenRows& rows, cpu::PageRange range,
                  void* page) {
  switch (layout.dtype) {
    case ElementType::kFloat32:
      return PackKeysAs<kFrom, ElementType::kFloat32>(layout, rows, range, page);
    case ElementType::kFloat16:
      return PackKeysAs<kFrom, ElementType::kFloat16>(layout, rows, range, page);
    case ElementType::kBFloat16:
      return PackKeysAs<kFrom, ElementType::kBFloat16>(layout, rows, range, page);
    case ElementType::kInt8:
      return PackInt8Keys<kFrom>(layout, rows, range, page);
  }
}

template <ElementType kFrom>
void PackValuesFrom(const PageLayout& layout, const cpu::TokenRows& rows, cpu::PageRange range,
                    void* values) {
  switch (layout.dtype) {
    case ElementType::kFloat32:
      return PackValuesAs<kFrom, ElementType::kFloat32>(layout, rows, range, values);
    case ElementType::kFloat16:
      return PackValuesAs<kFrom, ElementType::kFloat16>(layout, rows, range, values);
    case ElementType::kBFloat16:
      return PackValuesAs<kFrom, ElementType::kBFloat16>(layout, rows, range, values);
    case ElementType::kInt8:
      return PackInt8Values<kFrom>(layout, rows, range, values);
  }
}

// The rows' keys alone; `page` is where the page, and so its keys, begin. rows.value is not read.
inline void PackKeysOfPage(const PageLayout& layout, const cpu::TokenRows& rows,
                           cpu::PageRange range, void* page) {
  switch (rows.dtype) {
    case ElementType::kFloat32:
      return PackKeysFrom<ElementType::kFloat32>(layout, rows, range, page);
    case ElementType::kFloat16:
      return PackKeysFrom<ElementType::kFloat16>(layout, rows, range, page);
    case ElementType::kBFloat16:
      return PackKeysFrom<ElementType::kBFloat16>(layout, rows, range, page);
    case ElementType::kInt8:
      return;  // of pages only
  }
}

// The rows' values alone; `values` is where the values begin: layout.value_offset() bytes behind a
// whole page's start, or wherever a caller keeps values by themselves. rows.key is not read.
inline void PackValuesOfPage(const PageLayout& layout, const cpu::TokenRows& rows,
                             cpu::PageRange range, void* values) {
  switch (rows.dtype) {
    case ElementType::kFloat32:
      return PackValuesFrom<ElementType::kFloat32>(layout, rows, range, values);
    case ElementType::kFloat16:
      return PackValuesFrom<ElementType::kFloat16>(layout, rows, range, values);
    case ElementType::kBFloat16:
      return PackValuesFrom<ElementType::kBFloat16>(layout, rows, range, values);
    case ElementType::kInt8:
      return;  // of pages only
  }
}

inline void PackTokensOfPage(const PageLayout& layout, const cpu::TokenRows& rows,
                             cpu::PageRange range, void* page) {
  PackKeysOfPage(layout, rows, range, page);
  PackValuesOfPage(layout, rows, range, static_cast<char*>(page) + layout.value_offset());
}

inline void UnpackTokensOfPage(const PageLayout& layout, const void* page, cpu::PageRange range,
                               const cpu::MutableTokenRows& rows) {
  const bool same = rows.dtype == layout.dtype;
  switch (layout.dtype) {
    case ElementType::kFloat32:
      return UnpackAs<ElementType::kFloat32, ElementType::kFloat32>(layout, page, range, rows);
    case ElementType::kFloat16:
      return same
                 ? UnpackAs<ElementType::kFloat16, ElementType::kFloat16>(layout, page, range, rows)
                 : UnpackAs<ElementType::kFloat16, ElementType::kFloat32>(layout, page, range,
                                                                          rows);
    case ElementType::kBFloat16:
      return same ? UnpackAs<ElementType::kBFloat16, ElementType::kBFloat16>(layout, page, range,
                                                                             rows)
                  : UnpackAs<ElementType::kBFloat16, ElementType::kFloat32>(layout, page, range,
                                                                            rows);
    case ElementType::kInt8:
      return UnpackInt8(layout, page, range, rows);
  }
}
