// Which implementation executes a request, and why. Rules say what is eligible: the row's Supports,
// and whether approximate results are allowed; of those the table's order decides. Measured costs
// will rank them later, here.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "core/attention_implementation.h"

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

// NOT_FOUND for a name that is not in the table; FAILED_PRECONDITION where the named
// implementation, or none at all, can do what is asked, with those that can.
absl::StatusOr<Selection> SelectImplementation(ImplementationTable table,
                                               const SelectionRequest& request,
                                               const AttentionShape& shape);

// The row of that name, or NOT_FOUND.
absl::StatusOr<const ImplementationRow*> RequireImplementation(ImplementationTable table,
                                                               const std::string& name);

}  // namespace attn
