// A hosted layer around an interchangeable implementation: query, key and value in one GEMM, the
// model's per-head query/key normalisation, attention, output projection. LibTorch does the GEMMs;
// the implementation reads queries, keys and values where the GEMM left them (tokens first,
// strided). Cross-attention has two GEMMs: queries of the hidden states, keys and values of an
// encoder's.
#pragma once

#include <memory>

#include "core/attention_module.h"
#include "core/hosted_model.h"
#include "core/token_positions.h"

namespace attn {

class ProjectedAttention final : public AttentionModule {
 public:
  // `layer` has weights, and lives as long as this.
  ProjectedAttention(const HostedLayer& layer,
                     std::shared_ptr<const AttentionImplementation> implementation,
                     std::int64_t max_tokens)
      : layer_(layer), implementation_(std::move(implementation)), max_tokens_(max_tokens) {}

  absl::StatusOr<ForwardPlan> Plan(const ForwardInputs& inputs) const override;
  absl::Status Forward(const ForwardInputs& inputs, const ForwardOutputs& outputs,
                       ExecutionContext& context) const override;
  attn::MemoryUsage MemoryUsage(const AttentionShape& shape, int workers) const override;
  attn::ComputeComplexity ComputeComplexity(const AttentionShape& shape) const override;

 private:
  // A call's rows: its own, and those of the encoder where it brings some.
  struct CallRows {
    TokenRows tokens;
    TokenRows encoder;
  };
  // Where the rows' projections lie; null while planning.
  struct Projected {
    void* tokens = nullptr;
    void* encoder = nullptr;
  };

  bool is_cross() const { return layer_.kind == AttentionKind::kCross; }
  absl::StatusOr<CallRows> ReadCall(const ForwardInputs& inputs) const;
  absl::StatusOr<TokenRows> ReadRows(const char* field, const TensorView& states,
                                     std::int64_t hidden_size, const char* lengths_field,
                                     const std::vector<std::int64_t>& lengths) const;
  absl::Status CheckEncoder(const ForwardInputs& inputs, const CallRows& rows) const;
  absl::StatusOr<TokenPositions> ReadPositions(const ForwardInputs& inputs,
                                               const TokenRows& tokens) const;
  // The attention inside, on buffers of projected rows.
  absl::StatusOr<AttentionProblem> MakeProblem(const ForwardInputs& inputs, const CallRows& rows,
                                               const Projected& projected) const;
  // Query, key and value, normalised, where the problem expects them.
  absl::Status ProjectTokens(const ForwardInputs& inputs, const TokenRows& tokens, void* projected,
                             ExecutionContext& context) const;
  absl::Status ProjectEncoder(const ForwardInputs& inputs, const TokenRows& encoder,
                              void* projected, ExecutionContext& context) const;
  absl::Status ProjectOutput(const ForwardInputs& inputs, const TokenRows& tokens, void* attended,
                             MutableTensorView output, ExecutionContext& context) const;
  std::int64_t query_size() const;      // features of the queries
  std::int64_t attended_size() const;   // features of the attention inside, all heads together
  std::int64_t key_value_size() const;  // features of key and value
  // Features of what is projected: query, key and value together, or the query alone.
  std::int64_t projected_size(bool keys) const {
    return query_size() + (keys ? key_value_size() : 0);
  }
  std::uint64_t ProjectionFlops(std::uint64_t tokens, bool keys,
                                std::uint64_t encoder_tokens) const;

  const HostedLayer& layer_;
  const std::shared_ptr<const AttentionImplementation> implementation_;
  const std::int64_t max_tokens_;
};

}  // namespace attn
