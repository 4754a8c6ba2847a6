#include "core/selector.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/error.h"

namespace attn {
namespace {

// A row's refusal, with the implementations that would not refuse.
absl::Status Refuse(ImplementationTable table, const AttentionShape& shape, const std::string& name,
                    const absl::Status& why) {
  const std::string supporting = SupportingNames(table, shape);
  return MakeError(
      absl::StatusCode::kFailedPrecondition, "UNSUPPORTED_BY_IMPLEMENTATION",
      absl::StrCat(std::string(why.message()), "; implementations that can do it: ", supporting),
      {{"implementation", name}, {"supporting", supporting}});
}

absl::StatusOr<Selection> SelectBest(ImplementationTable table, const AttentionShape& shape,
                                     bool allow_approximate) {
  std::string passed_over;
  for (const ImplementationRow& row : table) {
    if (!row.traits.exact && !allow_approximate) continue;
    const absl::Status status = row.supports(shape);
    if (status.ok()) {
      return Selection{&row,
                       passed_over.empty()
                           ? absl::StrCat("auto: ", row.name, " is the first choice")
                           : absl::StrCat("auto: ", row.name, ", because ", passed_over),
                       false};
    }
    absl::StrAppend(&passed_over, passed_over.empty() ? "" : " and ",
                    std::string(status.message()));
  }
  return Refuse(table, shape, kAutoImplementation,
                Unsupported("no implementation can do what is asked"));
}

}  // namespace

absl::StatusOr<const ImplementationRow*> RequireImplementation(ImplementationTable table,
                                                               const std::string& name) {
  const ImplementationRow* row = FindImplementation(table, name);
  if (row != nullptr) return row;
  std::vector<std::string> names;
  for (const ImplementationRow& known : table) names.push_back(known.name);
  return MakeError(absl::StatusCode::kNotFound, "IMPLEMENTATION_NOT_FOUND",
                   absl::StrCat("there is no implementation '", name, "'; there are ",
                                absl::StrJoin(names, ", "), " and auto"),
                   {{"field", "implementation"}});
}

absl::StatusOr<Selection> SelectImplementation(ImplementationTable table,
                                               const SelectionRequest& request,
                                               const AttentionShape& shape) {
  if (request.named == kAutoImplementation ||
      (request.named.empty() && request.active == nullptr)) {
    return SelectBest(table, shape, request.allow_approximate);
  }
  if (!request.named.empty()) {
    ATTN_ASSIGN_OR_RETURN(const ImplementationRow* const row,
                          RequireImplementation(table, request.named));
    const absl::Status status = row->supports(shape);
    if (!status.ok()) return Refuse(table, shape, row->name, status);
    return Selection{row, "named in the request", false};
  }
  const absl::Status status = request.active->supports(shape);
  if (status.ok()) return Selection{request.active, "the model's active implementation", false};
  ATTN_ASSIGN_OR_RETURN(Selection selection, SelectBest(table, shape, request.allow_approximate));
  selection.reason =
      absl::StrCat("the active implementation gave way: ", std::string(status.message()), "; ",
                   selection.row->name, " can do it");
  selection.fell_back = true;
  return selection;
}

}  // namespace attn
