// Calls of the data plane without protobuf: what Forward and Attend take and give. What is left out
// stays unset on the wire: the layer's or the server's own value. The rules of each field (shapes,
// what goes with what) are the comments of proto/attention/v1/attention.proto.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "attention/v1/attention.pb.h"
#include "client/cpp/tensors.h"

namespace attn::client {

using TensorLayout = attention::v1::TensorLayout;

// One attention block of a model.
struct Layer {
  uint32_t index = 0;
  std::string stack = {};  // of a model with several
  bool cross = false;      // cross-attention, whose cache is apart
};

struct AttentionSettings {
  std::optional<double> scale = {};
  std::optional<bool> is_causal = {};
  std::optional<int64_t> window_left = {};  // -1: off
  std::optional<int64_t> window_right = {};
  std::optional<double> soft_cap = {};                  // 0: off
  std::optional<std::vector<float>> alibi_slopes = {};  // one per query head; empty: off
  std::optional<std::vector<float>> sink_logits = {};
};

struct ExecutionSettings {
  std::string implementation = {};  // empty: the model's active one
  // Of sparse implementations; at most one of the two.
  std::optional<double> sparsity_factor = {};
  std::optional<double> sparsity_mass = {};
  int32_t priority = 0;
};

enum class CacheMode { kAppend, kReadOnly, kDiscard };

// What becomes of a call's tokens in its sessions. Each list is empty or has one entry per session.
struct CacheUse {
  CacheMode mode = CacheMode::kAppend;
  std::vector<int64_t> truncate = {};        // -1: no cut
  std::vector<int64_t> cache_position = {};  // -1: unchecked
};

struct ForwardCall {
  Layer layer = {};
  Tensor hidden_states = {};          // [batch, q_len, hidden_size]
  Tensor encoder_hidden_states = {};  // cross-attention: [batch, kv_len, encoder_hidden_size]
  std::vector<int64_t> query_lengths = {};
  std::vector<int64_t> kv_lengths = {};
  Tensor attention_mask = {};
  Tensor position_ids = {};
  AttentionSettings attention = {};
  ExecutionSettings execution = {};
  CacheUse cache = {};  // sessions only
  bool output_attentions = false;
  std::optional<double> timeout_seconds = {};  // with all retries; unset: the client's
};

struct ForwardResult {
  Tensor output;  // [batch, q_len, hidden_size]
  Tensor attention_weights;
  std::vector<int64_t> cache_length;  // per session, after the call
  attention::v1::Execution execution;
  int attempts = 1;
};

struct AttendCall {
  Layer layer = {};
  TensorLayout tensor_layout = attention::v1::TENSOR_LAYOUT_HEADS_FIRST;
  Tensor query = {};  // [batch, num_heads, q_len, head_dim]
  Tensor key = {};    // [batch, num_kv_heads, kv_len, head_dim]; none with kReadOnly
  Tensor value = {};
  std::vector<int64_t> query_lengths = {};
  std::vector<int64_t> kv_lengths = {};
  std::vector<int64_t> first_query_position = {};
  Tensor attention_mask = {};
  AttentionSettings attention = {};
  ExecutionSettings execution = {};
  CacheUse cache = {};  // sessions only
  bool output_attentions = false;
  attention::v1::ScoreStage attention_stage = attention::v1::SCORE_STAGE_UNSPECIFIED;
  bool output_lse = false;
  DataType output_dtype = attention::v1::DATA_TYPE_UNSPECIFIED;
  std::optional<double> timeout_seconds = {};
};

struct AttendResult {
  Tensor output;
  Tensor attention_weights;
  Tensor lse;
  std::vector<int64_t> cache_length;
  attention::v1::Execution execution;
  int attempts = 1;
};

// For calls without a session: client.Attend(ToRequest("", std::move(call))). `cache` and the
// timeout have no place in a request. Bytes are moved, not copied.
attention::v1::ForwardRequest ToRequest(const std::string& model, ForwardCall call);
attention::v1::AttendRequest ToRequest(const std::string& model, AttendCall call);
ForwardResult ToResult(attention::v1::ForwardResponse response);
AttendResult ToResult(attention::v1::AttendResponse response);

}  // namespace attn::client
