// Arithmetic of page tables: how tokens fill blocks, and what a layer says about its cache.
#pragma once

#include <cstdint>

#include "core/attention_implementation.h"
#include "core/cached_rows.h"
#include "core/hosted_model.h"
#include "core/model_spec.h"
#include "kernels/page_layout.h"

namespace attn {

inline constexpr std::int64_t kBlockTokens = kernels::kPageTokens;

inline std::int64_t BlocksOf(std::int64_t tokens) {
  return (tokens + kBlockTokens - 1) / kBlockTokens;
}

inline kernels::PageLayout LayoutOf(const CacheDims& dims) {
  return {ToElementType(dims.dtype), dims.head_dim, dims.value_dim};
}

// A page for each KV head.
inline std::uint64_t BlockBytes(const CacheDims& dims) {
  return static_cast<std::uint64_t>(dims.num_kv_heads) *
         static_cast<std::uint64_t>(LayoutOf(dims).page_bytes());
}

inline CacheDims DimsOf(const LayerSpec& spec, DType dtype) {
  return {spec.num_kv_heads, spec.head_dim, spec.value_dim, dtype};
}

// Keys that a query of the layer sees before its own position, of which older ones may be let go;
// -1: all. Queries of a cross-attention have no place of their own among its keys.
inline std::int64_t LayerWindow(const HostedLayer& layer, AttentionKind kind) {
  return kind == AttentionKind::kCross ? -1 : layer.spec->options.window_left.value_or(-1);
}

}  // namespace attn
