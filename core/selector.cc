#include "core/selector.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
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

// An answer serves shapes up to an eighth of an octave larger than the one that it was made for.
constexpr double kCachedGrowth = 1.3;

std::string TimeText(double seconds) {
  if (seconds < 1e-3) return absl::StrFormat("%.3g us", seconds * 1e6);
  if (seconds < 1.0) return absl::StrFormat("%.3g ms", seconds * 1e3);
  return absl::StrFormat("%.3g s", seconds);
}

std::string MemoryText(std::uint64_t bytes) {
  constexpr double kMiB = 1048576.0;
  const double mib = static_cast<double>(bytes) / kMiB;
  if (mib < 1024.0) return absl::StrFormat("%.3g MiB", mib);
  return absl::StrFormat("%.3g GiB", mib / 1024.0);
}

// "flash: estimated 1.2 ms, torch_sdpa 1.9 ms; standard needs 3 GiB of scratch memory, ..."
std::string Explain(const std::vector<Candidate>& candidates) {
  std::string text;
  std::string refusals;
  for (const Candidate& candidate : candidates) {
    if (candidate.eligible) {
      absl::StrAppend(&text, text.empty() ? "auto: " : ", ", candidate.row->name,
                      text.empty() ? ": estimated " : " ", TimeText(candidate.estimated_seconds));
    } else if (candidate.row->traits.exact) {
      absl::StrAppend(&refusals, "; ", candidate.reason);
    }
  }
  return text + refusals;
}

// The first of those within the profile's factor of the fastest, which are in the table's order,
// goes before all others; these by their estimates; then those that are not eligible.
void SortByPreference(std::vector<Candidate>& candidates, double steady_factor) {
  const auto faster = [](const Candidate& a, const Candidate& b) {
    if (a.eligible != b.eligible) return a.eligible;
    return a.eligible && a.estimated_seconds < b.estimated_seconds;
  };
  const auto fastest = std::min_element(candidates.begin(), candidates.end(), faster);
  if (fastest == candidates.end() || !fastest->eligible) return;
  const double bound = fastest->estimated_seconds * steady_factor;
  const auto first = std::find_if(candidates.begin(), candidates.end(), [&](const Candidate& c) {
    return c.eligible && c.estimated_seconds <= bound;
  });
  std::rotate(candidates.begin(), first, first + 1);
  std::stable_sort(candidates.begin() + 1, candidates.end(), faster);
}

bool HasBackend(const ImplementationRow& row, const std::string& backend) {
  const std::vector<std::string>& backends = row.traits.backends;
  return backends.empty() || std::find(backends.begin(), backends.end(), backend) != backends.end();
}

bool HasDType(const ImplementationRow& row, DType dtype) {
  const std::vector<DType>& dtypes = row.traits.dtypes;
  return dtypes.empty() || std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end();
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

Selector::Selector(ImplementationTable table, SelectorOptions options)
    : table_(table),
      options_(std::move(options)),
      model_(*options_.profile, options_.units, options_.timings,
             [this](const std::string& name, const AttentionShape& shape) -> std::uint64_t {
               const ImplementationRow* const row = FindImplementation(table_, name);
               return row == nullptr ? 0 : InstanceOf(*row)->Complexity(shape).flops;
             }) {
  for (const ImplementationRow& row : table_) instances_.push_back(row.create());
}

const AttentionImplementation* Selector::InstanceOf(const ImplementationRow& row) const {
  return instances_[static_cast<std::size_t>(&row - table_.data())].get();
}

absl::Status Selector::Eligible(const ImplementationRow& row, const AttentionShape& shape,
                                bool allow_approximate) const {
  if (!HasBackend(row, options_.profile->backend)) {
    return Unsupported(absl::StrCat(row.name, " does not run on ", options_.profile->backend));
  }
  if (!HasDType(row, shape.dtype)) {
    return Unsupported(absl::StrCat(row.name, " does not compute in ", DTypeName(shape.dtype)));
  }
  ATTN_RETURN_IF_ERROR(row.supports(shape));
  if (!row.traits.exact && !allow_approximate) {
    return Unsupported(absl::StrCat(row.name, " is approximate, which the model does not allow"));
  }
  return absl::OkStatus();
}

std::uint64_t Selector::UsableBytes(std::uint64_t wanted) const {
  const std::uint64_t limit = options_.workspace_limit;
  if (wanted <= options_.profile->unasked_bytes || options_.available_bytes == nullptr) {
    return limit;
  }
  return std::min(limit, options_.available_bytes());
}

absl::Status Selector::Fits(const ImplementationRow& row, std::uint64_t bytes) const {
  const std::uint64_t usable = UsableBytes(bytes);
  if (bytes <= usable) return absl::OkStatus();
  return MakeError(absl::StatusCode::kResourceExhausted, "WORKSPACE_LIMIT",
                   absl::StrCat(row.name, " needs ", MemoryText(bytes),
                                " of scratch memory, but it can have ", MemoryText(usable)),
                   {{"implementation", row.name}});
}

// A library's appetite is an estimate: what it takes is held against the limit as it takes it.
absl::Status Selector::FitsNamed(const ImplementationRow& row, const AttentionShape& shape) const {
  const MemoryUsage usage = InstanceOf(row)->WorkspaceBytes(shape, options_.units);
  return usage.exact ? Fits(row, usage.bytes) : absl::OkStatus();
}

Candidate Selector::Consider(const ImplementationRow& row, const AttentionShape& shape,
                             bool allow_approximate) const {
  Candidate candidate;
  candidate.row = &row;
  absl::Status status = Eligible(row, shape, allow_approximate);
  if (row.supports(shape).ok()) {
    const AttentionImplementation& instance = *InstanceOf(row);
    candidate.workspace_bytes = instance.WorkspaceBytes(shape, options_.units).bytes;
    candidate.operations = instance.Complexity(shape).flops;
    candidate.estimated_seconds = model_.Estimate(row.name, shape, candidate.operations);
  }
  if (status.ok()) {
    status = Fits(row, candidate.workspace_bytes);
    candidate.lacks_memory = !status.ok();
  }
  candidate.eligible = status.ok();
  candidate.reason = status.ok() ? absl::StrCat("estimated ", TimeText(candidate.estimated_seconds))
                                 : std::string(status.message());
  return candidate;
}

std::vector<Candidate> Selector::Candidates(const AttentionShape& shape,
                                            bool allow_approximate) const {
  std::vector<Candidate> candidates;
  for (const ImplementationRow& row : table_) {
    candidates.push_back(Consider(row, shape, allow_approximate));
  }
  SortByPreference(candidates, options_.profile->steady_factor);
  return candidates;
}

absl::StatusOr<Selection> Selector::SelectFastest(const AttentionShape& shape,
                                                  bool allow_approximate) const {
  const SelectionKey key = SelectionKeyOf(shape, allow_approximate);
  const std::uint64_t version = model_.version();
  const auto holds = [&](const CachedSelection& known) {
    const auto bytes =
        static_cast<std::uint64_t>(static_cast<double>(known.workspace_bytes) * kCachedGrowth);
    const std::uint64_t usable = UsableBytes(std::max(bytes, known.refused_bytes));
    return bytes <= usable && (known.refused_bytes == 0 || known.refused_bytes > usable) &&
           known.row->supports(shape).ok();
  };
  if (std::optional<CachedSelection> known = cache_.Find(key, version); known && holds(*known)) {
    return Selection{known->row, std::move(known->reason), false};
  }
  const std::vector<Candidate> candidates = Candidates(shape, allow_approximate);
  if (candidates.empty() || !candidates.front().eligible) {
    for (const Candidate& candidate : candidates) {
      if (candidate.lacks_memory) return Fits(*candidate.row, candidate.workspace_bytes);
    }
    return Refuse(table_, shape, kAutoImplementation,
                  Unsupported("no implementation can do what is asked"));
  }
  CachedSelection answer{candidates.front().row, Explain(candidates),
                         candidates.front().workspace_bytes, 0};
  for (const Candidate& candidate : candidates) {
    if (!candidate.lacks_memory) continue;
    if (answer.refused_bytes == 0 || candidate.workspace_bytes < answer.refused_bytes) {
      answer.refused_bytes = candidate.workspace_bytes;
    }
  }
  Selection selection{answer.row, answer.reason, false};
  cache_.Store(key, version, std::move(answer));
  return selection;
}

absl::StatusOr<Selection> Selector::Select(const SelectionRequest& request,
                                           const AttentionShape& shape) const {
  if (request.named == kAutoImplementation ||
      (request.named.empty() && request.active == nullptr)) {
    return SelectFastest(shape, request.allow_approximate);
  }
  if (!request.named.empty()) {
    ATTN_ASSIGN_OR_RETURN(Selection selection, SelectImplementation(table_, request, shape));
    ATTN_RETURN_IF_ERROR(FitsNamed(*selection.row, shape));
    return selection;
  }
  absl::Status status = request.active->supports(shape);
  if (status.ok()) status = FitsNamed(*request.active, shape);
  if (status.ok()) return Selection{request.active, "the model's active implementation", false};
  ATTN_ASSIGN_OR_RETURN(Selection selection, SelectFastest(shape, request.allow_approximate));
  selection.reason =
      absl::StrCat("the active implementation gave way: ", std::string(status.message()), "; ",
                   selection.row->name, " can do it");
  selection.fell_back = true;
  return selection;
}

}  // namespace attn
