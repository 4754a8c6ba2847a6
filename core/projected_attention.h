// A hosted layer around an interchangeable implementation: query, key and value in one GEMM, the
// model's per-head query/key normalisation, attention, output projection. LibTorch does the GEMMs;
// the implementation reads queries, keys and values where the GEMM left them (tokens first,
// strided).
#pragma once

#include <memory>

#include "core/attention_module.h"
#include "core/hosted_model.h"

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
  struct Tokens;  // how the rows of hidden_states lie

  absl::StatusOr<Tokens> ReadTokens(const ForwardInputs& inputs) const;
  absl::Status CheckPositions(const ForwardInputs& inputs, const Tokens& tokens) const;
  absl::Status CheckCachePosition(const ForwardInputs& inputs, const Tokens& tokens) const;
  // The attention inside, on a query/key/value buffer at `projected` (null while planning).
  absl::StatusOr<AttentionProblem> MakeProblem(const ForwardInputs& inputs, const Tokens& tokens,
                                               const void* projected) const;
  std::int64_t attended_size() const;   // features of the attention inside, all heads together
  std::int64_t projected_size() const;  // features of query, key and value together
  std::uint64_t ProjectionFlops(std::uint64_t tokens) const;

  const HostedLayer& layer_;
  const std::shared_ptr<const AttentionImplementation> implementation_;
  const std::int64_t max_tokens_;
};

}  // namespace attn
