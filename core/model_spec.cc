#include "core/model_spec.h"

namespace attn {
namespace {

template <typename T>
std::optional<T> Winner(const std::optional<T>& layer, const std::optional<T>& request) {
  return request.has_value() ? request : layer;
}

}  // namespace

const char* ModalityName(Modality modality) {
  switch (modality) {
    case Modality::kUnspecified:
      return "unspecified";
    case Modality::kLanguage:
      return "language";
    case Modality::kVision:
      return "vision";
    case Modality::kMultimodal:
      return "multimodal";
  }
  return "unspecified";
}

AttentionOptions Override(const AttentionOptions& layer, const AttentionOptions& request) {
  return {
      .scale = Winner(layer.scale, request.scale),
      .is_causal = Winner(layer.is_causal, request.is_causal),
      .window_left = Winner(layer.window_left, request.window_left),
      .window_right = Winner(layer.window_right, request.window_right),
      .soft_cap = Winner(layer.soft_cap, request.soft_cap),
      .alibi_slopes = Winner(layer.alibi_slopes, request.alibi_slopes),
      .sink_logits = Winner(layer.sink_logits, request.sink_logits),
  };
}

}  // namespace attn
