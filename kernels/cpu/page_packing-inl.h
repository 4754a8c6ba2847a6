// The text of page_packing.h, after vec-inl.h. Elements move one by one, a small tile at a time so
// that both sides of the transposition stay in the first-level cache.

constexpr int64_t kTileTokens = 16;
constexpr int64_t kTileDims = 16;

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

template <ElementType kFrom, ElementType kTo>
void PackAs(const PageLayout& layout, const cpu::TokenRows& rows, cpu::PageRange range,
            void* page) {
  using From = typename Elements<kFrom>::Type;
  using To = typename Elements<kTo>::Type;
  To* const keys = static_cast<To*>(page);
  for (int64_t d0 = 0; d0 < layout.head_dim; d0 += kTileDims) {
    const int64_t dims = layout.head_dim - d0 < kTileDims ? layout.head_dim - d0 : kTileDims;
    for (int64_t t = 0; t < range.count; ++t) {
      const From* const from = static_cast<const From*>(rows.key) + t * rows.key_stride + d0;
      for (int64_t d = 0; d < dims; ++d) {
        keys[layout.KeyElement(range.first + t, d0 + d)] = ConvertOne<kFrom, kTo>(from + d);
      }
    }
  }
  for (int64_t d = layout.head_dim; d < layout.padded_head_dim(); ++d) {
    for (int64_t t = 0; t < range.count; ++t) keys[layout.KeyElement(range.first + t, d)] = 0;
  }
  To* const values = reinterpret_cast<To*>(static_cast<char*>(page) + layout.value_offset());
  for (int64_t t = 0; t < range.count; ++t) {
    const From* const from = static_cast<const From*>(rows.value) + t * rows.value_stride;
    for (int64_t c = 0; c < layout.value_dim; ++c) {
      values[layout.ValueElement(range.first + t, c)] = ConvertOne<kFrom, kTo>(from + c);
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
    for (int64_t d0 = 0; d0 < layout.head_dim; d0 += kTileDims) {
      const int64_t dims = layout.head_dim - d0 < kTileDims ? layout.head_dim - d0 : kTileDims;
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
void PackFrom(const PageLayout& layout, const cpu::TokenRows& rows, cpu::PageRange range,
              void* page) {
  switch (layout.dtype) {
    case ElementType::kFloat32:
      return PackAs<kFrom, ElementType::kFloat32>(layout, rows, range, page);
    case ElementType::kFloat16:
      return PackAs<kFrom, ElementType::kFloat16>(layout, rows, range, page);
    case ElementType::kBFloat16:
      return PackAs<kFrom, ElementType::kBFloat16>(layout, rows, range, page);
  }
}

inline void PackTokensOfPage(const PageLayout& layout, const cpu::TokenRows& rows,
                             cpu::PageRange range, void* page) {
  switch (rows.dtype) {
    case ElementType::kFloat32:
      return PackFrom<ElementType::kFloat32>(layout, rows, range, page);
    case ElementType::kFloat16:
      return PackFrom<ElementType::kFloat16>(layout, rows, range, page);
    case ElementType::kBFloat16:
      return PackFrom<ElementType::kBFloat16>(layout, rows, range, page);
  }
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
  }
}
