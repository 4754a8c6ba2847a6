// Which implementation executes a request, and why. Rules say what is eligible: the row's Supports,
// its traits, whether approximate results are allowed, the memory that is free now. Of those a
// Selector takes the fastest by its cost model; without one the table's order decides.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/attention_implementation.h"
#include "core/cost_model.h"
#include "core/hardware_profiles.h"
#include "core/selection_cache.h"

namespace attn {

inline constexpr char kAutoImplementation[] = "auto";

struct Selection {
  const ImplementationRow* row = nullptr;
  std::string reason;      // one sentence, for people
  bool fell_back = false;  // the model's active implementation could not do what was asked
};

// What a request and its model say about the choice.
struct SelectionRequest {
  std::string named;                          // by the request; empty: the active one
  const ImplementationRow* active = nullptr;  // null: "auto"
  bool allow_approximate = false;
};

// By the rules and the table's order alone. NOT_FOUND for a name that is not in the table;
// FAILED_PRECONDITION where the named implementation, or none at all, can do what is asked, with
// those that can.
absl::StatusOr<Selection> SelectImplementation(ImplementationTable table,
                                               const SelectionRequest& request,
                                               const AttentionShape& shape);

// The row of that name, or NOT_FOUND.
absl::StatusOr<const ImplementationRow*> RequireImplementation(ImplementationTable table,
                                                               const std::string& name);

// One implementation as "auto" sees it.
struct Candidate {
  const ImplementationRow* row = nullptr;
  bool eligible = false;
  bool lacks_memory = false;  // it could, with more memory
  std::string reason;         // the estimate, or why it was passed over
  double estimated_seconds = 0.0;
  std::uint64_t workspace_bytes = 0;
  std::uint64_t operations = 0;
};

// What choices on one device depend on.
struct SelectorOptions {
  const HardwareProfile* profile = nullptr;  // never null when given to a Selector
  int units = 1;                             // cores or multiprocessors
  std::uint64_t workspace_limit = UINT64_MAX;
  std::function<std::uint64_t()> available_bytes;  // of the device, now; null: enough
  const MeasuredTimings* timings = nullptr;        // outlives the selector
};

// The choice on one device, for all models on it. Safe from several threads. An answer from the
// cache takes less than 5 us; one from the model, some ten.
class Selector {
 public:
  Selector(ImplementationTable table, SelectorOptions options);

  // As SelectImplementation, and "auto" is the fastest by estimate. RESOURCE_EXHAUSTED (reason
  // WORKSPACE_LIMIT) where the named implementation, or all that could, need more memory than there
  // is.
  absl::StatusOr<Selection> Select(const SelectionRequest& request,
                                   const AttentionShape& shape) const;

  // Every row, in the order in which "auto" would take them; those that it would not take last.
  std::vector<Candidate> Candidates(const AttentionShape& shape, bool allow_approximate) const;

  void SetPeaks(const Peaks& peaks) { model_.SetPeaks(peaks); }
  const HardwareProfile& profile() const { return *options_.profile; }

 private:
  absl::StatusOr<Selection> SelectFastest(const AttentionShape& shape,
                                          bool allow_approximate) const;
  // OK, or why the row is passed over, memory aside.
  absl::Status Eligible(const ImplementationRow& row, const AttentionShape& shape,
                        bool allow_approximate) const;
  // OK, or RESOURCE_EXHAUSTED.
  absl::Status Fits(const ImplementationRow& row, std::uint64_t bytes) const;
  absl::Status FitsNamed(const ImplementationRow& row, const AttentionShape& shape) const;
  std::uint64_t UsableBytes(std::uint64_t wanted) const;
  Candidate Consider(const ImplementationRow& row, const AttentionShape& shape,
                     bool allow_approximate) const;
  const AttentionImplementation* InstanceOf(const ImplementationRow& row) const;

  const ImplementationTable table_;
  const SelectorOptions options_;
  std::vector<std::unique_ptr<AttentionImplementation>> instances_;  // parallel to table_
  CostModel model_;
  mutable SelectionCache cache_;
};

}  // namespace attn
