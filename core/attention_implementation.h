// What an implementation of attention is: one row of the table that main passes down, and the
// object that the row makes. Selector, manager, benchmark, conformance tests, ListImplementations
// and metric labels iterate the table.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/workspace.h"
#include "kernels/attention_args.h"

namespace attn {

// An execution's shape and demands, without its tensors: what Supports, MemoryUsage and
// ComputeComplexity look at.
struct AttentionShape {
  std::int64_t batch = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  std::int64_t q_len = 0;          // of the longest row
  std::int64_t kv_len = 0;         // of the longest row, past included
  std::int64_t longest_pairs = 0;  // q_len * kv_len of the row where that is largest
  std::int64_t pairs =
      0;  // query-key pairs of all rows, one head, before masks: sum of q_len * kv_len
  DType dtype = DType::kFloat32;
  DType output_dtype = DType::kFloat32;
  bool ragged = false;      // rows differ in length
  bool split_keys = false;  // a row's keys lie in several spans
  bool is_causal = false;
  bool has_window = false;
  bool has_soft_cap = false;
  bool has_alibi = false;
  bool has_sinks = false;
  kernels::MaskType mask = kernels::MaskType::kNone;
  kernels::ScoreStage stage = kernels::ScoreStage::kNone;  // of the weights that are asked for
  bool output_lse = false;
};

// The shape of a complete problem.
AttentionShape ShapeOf(const kernels::AttentionArgs& args);

// Scratch memory in bytes, beyond inputs and outputs, with `workers` tasks at a time.
struct MemoryUsage {
  std::uint64_t bytes = 0;
  bool exact = true;  // an estimate where a library allocates by itself; what it took is measured
};

struct ComputeComplexity {
  std::uint64_t flops = 0;  // two per multiply-add
  std::string growth;       // "O(n^2 d)"
};

struct Traits {
  std::vector<std::string> backends;
  std::vector<DType> dtypes;
  bool exact = true;
  bool outputs_attentions = false;
  bool batch_invariant = false;  // a sequence's bits do not depend on its company
  std::string memory;            // growth of the workspace
  std::string compute;           // growth of the work
  std::string description;
};

// What an execution may use, and what it leaves behind.
struct ExecutionContext {
  Device& device;
  Workspace& workspace;
  const bool* cancelled =
      nullptr;  // read with __atomic_load_n; work may stop, and its result is dropped

  bool IsCancelled() const {
    return cancelled != nullptr && __atomic_load_n(cancelled, __ATOMIC_RELAXED);
  }

  // Counted by who does the work.
  std::uint64_t flops = 0;
  std::uint64_t packed_input_bytes = 0;
};

class AttentionImplementation {
 public:
  virtual ~AttentionImplementation() = default;

  // Fills the outputs that `args` names. On the executor's driver; `shape` describes `args` and was
  // accepted by the row's Supports.
  virtual absl::Status Attend(const kernels::AttentionArgs& args, const AttentionShape& shape,
                              ExecutionContext& context) const = 0;

  virtual MemoryUsage WorkspaceBytes(const AttentionShape& shape, int workers) const = 0;
};

struct ImplementationRow {
  std::string name;
  Traits traits;
  // OK, or why not (FAILED_PRECONDITION).
  absl::Status (*supports)(const AttentionShape& shape);
  std::unique_ptr<AttentionImplementation> (*create)();
};

// Best first: "auto" takes the first row that can do what is asked.
using ImplementationTable = absl::Span<const ImplementationRow>;

// The rows that come with the server (core/registry.cc).
ImplementationTable BuiltInImplementations();

// "standard, torch_sdpa": those that support `shape`; for messages.
std::string SupportingNames(ImplementationTable table, const AttentionShape& shape);

const ImplementationRow* FindImplementation(ImplementationTable table, const std::string& name);

// Floating-point operations of attention on this shape: both products over all pairs that causality
// leaves.
ComputeComplexity AttentionComplexity(const AttentionShape& shape);

// "num_heads 12, ...": FAILED_PRECONDITION with reason UNSUPPORTED_BY_IMPLEMENTATION.
absl::Status Unsupported(const std::string& what);

}  // namespace attn
