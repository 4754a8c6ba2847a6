// One attention layer's parameters, owned, row-major, 64-byte aligned. A projection is y = x W^T +
// b with W [out_features, in_features], as checkpoints store it; biases and norms are optional
// (undefined where absent).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/dtype.h"

namespace attn {

// A dense parameter tensor. `data` keeps its memory alive.
struct Parameter {
  std::shared_ptr<const void> data;
  DType dtype = DType::kUnspecified;
  std::vector<std::int64_t> shape;

  bool defined() const { return data != nullptr; }
  std::int64_t num_elements() const {
    std::int64_t n = 1;
    for (std::int64_t extent : shape) n *= extent;
    return n;
  }
  std::size_t bytes() const {
    return defined() ? static_cast<std::size_t>(num_elements()) * ItemSize(dtype) : 0;
  }
};

struct Projection {
  Parameter weight;  // [out_features, in_features]
  Parameter bias;    // [out_features], or undefined
};

struct LayerWeights {
  // Self-attention: query, key and value in one matrix, [ (num_heads + num_kv_heads) * head_dim +
  // num_kv_heads * value_dim, hidden_size ], in this order, so that one GEMM makes all three.
  // Cross-attention: the query's rows alone.
  Projection query_key_value;
  // Cross-attention: key and value in one matrix, [ num_kv_heads * (head_dim + value_dim),
  // encoder_hidden_size ]; undefined otherwise.
  Projection key_value;
  Projection output;     // [hidden_size, num_heads * value_dim]
  Parameter query_norm;  // [head_dim]: per-head RMS norm of queries before position encoding, or
                         // undefined. In float32 it multiplies before values are rounded to the
                         // model's dtype, in that dtype after
  Parameter key_norm;    // the same for keys
  float norm_epsilon = 1e-6f;

  std::size_t bytes() const {
    return query_key_value.weight.bytes() + query_key_value.bias.bytes() +
           key_value.weight.bytes() + key_value.bias.bytes() + output.weight.bytes() +
           output.bias.bytes() + query_norm.bytes() + key_norm.bytes();
  }
};

}  // namespace attn
