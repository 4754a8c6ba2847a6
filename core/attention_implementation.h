// What an implementation of attention is: one row of the table that main passes down, and the
// object that the row makes. Selector, manager, benchmark, conformance tests, ListImplementations
// and metric labels iterate the table.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/sparsity.h"
#include "core/workspace.h"
#include "kernels/attention_args.h"

namespace attn {

constexpr kernels::ElementType ToElementType(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return kernels::ElementType::kFloat16;
    case DType::kBFloat16:
      return kernels::ElementType::kBFloat16;
    case DType::kInt8:
      return kernels::ElementType::kInt8;
    default:
      return kernels::ElementType::kFloat32;
  }
}

constexpr DType FromElementType(kernels::ElementType type) {
  switch (type) {
    case kernels::ElementType::kFloat16:
      return DType::kFloat16;
    case kernels::ElementType::kBFloat16:
      return DType::kBFloat16;
    case kernels::ElementType::kInt8:
      return DType::kInt8;
    case kernels::ElementType::kFloat32:
      break;
  }
  return DType::kFloat32;
}

// One row's lengths, and where its first query stands among its keys.
struct RowShape {
  std::int64_t q_len = 0;
  std::int64_t kv_len = 0;
  std::int64_t first_query_position = 0;
};

// An execution's shape and demands, without its tensors: what Supports, MemoryUsage and
// ComputeComplexity look at.
struct AttentionShape {
  std::int64_t batch = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  std::int64_t q_len = 0;   // of the longest row
  std::int64_t kv_len = 0;  // of the longest row, past included
  // Query-key pairs of one head before masks, of the row that has most and of all rows: q_len *
  // kv_len, without the keys that TrimmedKeys leaves out.
  std::int64_t longest_pairs = 0;
  std::int64_t pairs = 0;
  std::int64_t paged_tokens = 0;  // of all rows, that lie in pages and can be seen
  std::vector<RowShape> rows;     // empty: all of q_len and kv_len, the queries last
  DType dtype = DType::kFloat32;  // of the query
  DType kv_dtype = DType::kFloat32;
  DType output_dtype = DType::kFloat32;
  bool paged = false;       // keys and values lie in a cache's pages
  bool ragged = false;      // rows differ in length
  bool split_keys = false;  // a row's keys lie in several spans
  bool is_causal = false;
  bool has_window = false;
  std::int64_t window_left = -1;
  std::int64_t window_right = -1;
  bool has_soft_cap = false;
  bool has_alibi = false;
  bool has_sinks = false;
  kernels::MaskType mask = kernels::MaskType::kNone;
  std::int64_t mask_extent = 0;                            // keys that it covers
  kernels::ScoreStage stage = kernels::ScoreStage::kNone;  // of the weights that are asked for
  bool output_lse = false;
  SparsityOptions sparsity;  // of approximate implementations
};

// The first key that a query of the sequence sees by position alone; kv_len where none sees any.
std::int64_t FirstVisibleKey(const kernels::AttentionArgs& args, const kernels::Sequence& sequence);

// How many of a sequence's first keys may be left out of an execution: those in pages before the
// first visible one, where nothing counts keys from 0 (a mask, the weights).
std::int64_t TrimmedKeys(const kernels::AttentionArgs& args, const kernels::Sequence& sequence);

// The shape of a complete problem; and a problem of this shape that has no tensors, for plans.
AttentionShape ShapeOf(const kernels::AttentionArgs& args);
class ShapeProblem {
 public:
  explicit ShapeProblem(const AttentionShape& shape);
  const kernels::AttentionArgs& args() const { return args_; }

 private:
  kernels::AttentionArgs args_;
  std::vector<kernels::Sequence> sequences_;
};

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

constexpr std::uint64_t kDefaultMemoryBudget = std::uint64_t{1} << 20;

// What an execution may use, and what it leaves behind.
struct ExecutionContext {
  Device& device;
  Workspace& workspace;
  const bool* cancelled =
      nullptr;  // read with __atomic_load_n; work may stop, and its result is dropped

  bool IsCancelled() const {
    return cancelled != nullptr && __atomic_load_n(cancelled, __ATOMIC_RELAXED);
  }

  SparsityOptions sparsity = {};  // for approximate implementations
  // Scratch memory that memory_efficient may take.
  std::uint64_t memory_budget = kDefaultMemoryBudget;

  // Counted by who does the work.
  std::uint64_t flops = 0;
  std::uint64_t packed_input_bytes = 0;
  std::optional<SparsityReport> sparsity_report = {};  // approximate implementations alone
};

class AttentionImplementation {
 public:
  virtual ~AttentionImplementation() = default;

  // Fills the outputs that `args` names. On the executor's driver; `shape` describes `args` and was
  // accepted by the row's Supports.
  virtual absl::Status Attend(const kernels::AttentionArgs& args, const AttentionShape& shape,
                              ExecutionContext& context) const = 0;

  virtual MemoryUsage WorkspaceBytes(const AttentionShape& shape, int workers) const = 0;

  // The operations that Attend counts in context.flops. Implementations of our own know them
  // exactly, but for what `sparse` will leave out, which it takes from the factor.
  virtual ComputeComplexity Complexity(const AttentionShape& shape) const;
};

struct ImplementationRow {
  std::string name;
  Traits traits;
  // OK, or why not (FAILED_PRECONDITION).
  absl::Status (*supports)(const AttentionShape& shape);
  std::unique_ptr<AttentionImplementation> (*create)();
};

// Best first: what "auto" takes where nothing is estimated (core/selector.h).
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
