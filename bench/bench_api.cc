#include "bench/bench_api.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <map>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bench/limits.h"
#include "bench/long_document.h"
#include "bench/problem.h"
#include "bench/recovery.h"
#include "core/attention_implementation.h"
#include "core/error.h"
#include "core/hardware.h"
#include "core/measured_timings.h"
#include "core/selector.h"
#include "core/workspace.h"

namespace attn::bench {
namespace {

using nlohmann::json;

// Scratch memory that stays between executions: steady traffic meets no page faults.
constexpr std::size_t kKeepBytes = std::size_t{256} << 20;

ProblemSpec SpecFrom(const json& shape) {
  ProblemSpec spec;
  spec.batch = shape.at("batch");
  spec.num_heads = shape.at("num_heads");
  spec.num_kv_heads = shape.at("num_kv_heads");
  spec.q_len = shape.at("q_len");
  spec.kv_len = shape.at("kv_len");
  spec.head_dim = shape.at("head_dim");
  spec.value_dim = shape.at("value_dim");
  spec.is_causal = shape.at("is_causal");
  spec.dtype = shape.at("dtype");
  spec.cache_dtype = shape.value("cache_dtype", "");
  spec.cache_copies = shape.value("cache_copies", std::int64_t{1});
  return spec;
}

template <typename T>
T* Address(const json& value) {
  return reinterpret_cast<T*>(value.get<std::uintptr_t>());
}

absl::StatusOr<SparsityOptions> SparsityFrom(const json& options) {
  SparsityOptions sparsity;
  for (const auto& [name, value] : options.items()) {
    if (name == "factor") {
      sparsity.factor = value.get<double>();
    } else if (name == "mass") {
      sparsity.mass = value.get<double>();
    } else {
      return Unsupported(absl::StrCat("option ", name, " is not available"));
    }
  }
  return sparsity;
}

}  // namespace

class Bench {
 public:
  Bench(int threads, std::size_t workspace_limit)
      : device_(CreateCpuDevice(Executor::Options{threads, 20, nullptr})),
        workspace_(*device_, workspace_limit, kKeepBytes),
        limits_(*device_),
        selector_(BuiltInImplementations(), OptionsOfSelector(workspace_limit)) {
    device_->executor().Run([this] { selector_.SetPeaks(MeasurePeaks(*device_)); });
  }

  const char* Call(const char* request) {
    json reply;
    try {
      absl::StatusOr<json> answer = Dispatch(json::parse(request));
      if (answer.ok()) {
        reply = *std::move(answer);
      } else {
        const auto code = answer.status().code();
        reply = {{"error", std::string(answer.status().message())},
                 {"unsupported", code == absl::StatusCode::kFailedPrecondition ||
                                     code == absl::StatusCode::kUnimplemented ||
                                     code == absl::StatusCode::kNotFound}};
      }
    } catch (const std::exception& error) {
      reply = {{"error", error.what()}, {"unsupported", false}};
    }
    reply_ = reply.dump();
    return reply_.c_str();
  }

 private:
  absl::StatusOr<json> Dispatch(const json& request) {
    const std::string op = request.at("op");
    if (op == "describe") return Describe();
    if (op == "make") return Make(request);
    if (op == "run") return Run(request);
    if (op == "limit") return Limit(request);
    if (op == "long_document") return LongDocument(request);
    if (op == "output") return CopyOutput(request);
    if (op == "recovery") return Recover(request);
    if (op == "select") return Select(request);
    if (op == "learn") return Learn(request);
    if (op == "release") {
      problems_.erase(request.at("slot").get<std::string>());
      return json::object();
    }
    return InvalidField("op", absl::StrCat("there is no op ", op));
  }

  json Describe() const {
    const CpuHardware hardware = DescribeCpu();
    json implementations = json::array();
    for (const ImplementationRow& row : BuiltInImplementations()) {
      implementations.push_back({{"name", row.name},
                                 {"exact", row.traits.exact},
                                 {"memory", row.traits.memory},
                                 {"compute", row.traits.compute}});
    }
    json loops = {{"read", limits_.read_loop()}};
    for (const char* dtype : {"float32", "bfloat16"})
      loops[dtype] = MachineLimits::FlopsLoop(dtype);
    return {{"model", hardware.model},
            {"isa", hardware.active},
            {"features", hardware.features},
            {"threads", device_->executor().threads()},
            {"memory_bytes", hardware.memory_bytes},
            {"loops", std::move(loops)},
            {"implementations", std::move(implementations)}};
  }

  absl::StatusOr<json> Make(const json& request) {
    ATTN_ASSIGN_OR_RETURN(std::unique_ptr<Problem> problem,
                          Problem::Create(*device_, SpecFrom(request.at("shape")),
                                          {Address<const void>(request.at("query")),
                                           Address<const void>(request.at("key")),
                                           Address<const void>(request.at("value"))}));
    problems_[request.at("slot").get<std::string>()] = std::move(problem);
    return json::object();
  }

  absl::StatusOr<Problem*> Find(const json& request) {
    const std::string slot = request.at("slot");
    const auto found = problems_.find(slot);
    if (found == problems_.end()) return InvalidField("slot", absl::StrCat("no slot ", slot));
    return found->second.get();
  }

  absl::StatusOr<json> Run(const json& request) {
    ATTN_ASSIGN_OR_RETURN(Problem* const problem, Find(request));
    const std::string name = request.at("implementation");
    const ImplementationRow* const row = FindImplementation(BuiltInImplementations(), name);
    if (row == nullptr) return absl::NotFoundError(absl::StrCat("no implementation ", name));
    auto& implementation = implementations_[name];
    if (implementation == nullptr) implementation = row->create();

    const std::int64_t repeats = request.value("repeats", std::int64_t{1});
    const double min_seconds = request.value("min_seconds", 0.0);
    const json options = request.value("options", json::object());
    bool timed = !request.value("warm", true);
    double total = 0;
    std::vector<double> seconds;
    json reply;
    while (static_cast<std::int64_t>(seconds.size()) < repeats || total < min_seconds) {
      kernels::AttentionArgs args = problem->Next();
      AttentionShape shape = ShapeOf(args);
      ATTN_ASSIGN_OR_RETURN(shape.sparsity, SparsityFrom(options));
      ATTN_RETURN_IF_ERROR(row->supports(shape));
      ATTN_ASSIGN_OR_RETURN(const double took, Execute(*implementation, args, shape, reply));
      if (timed) {
        seconds.push_back(took);
        total += took;
      }
      timed = true;
    }
    reply["seconds"] = seconds;
    return reply;
  }

  // One execution on the driver; fills in what it used.
  absl::StatusOr<double> Execute(const AttentionImplementation& implementation,
                                 const kernels::AttentionArgs& args, const AttentionShape& shape,
                                 json& used) {
    absl::Status status;
    double seconds = 0;
    device_->executor().Run([&] {
      workspace_.Reset();
      ExecutionContext context{*device_, workspace_, nullptr};
      context.sparsity = shape.sparsity;
      const auto begin = std::chrono::steady_clock::now();
      status = implementation.Attend(args, shape, context);
      seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      used = {{"workspace_bytes", workspace_.meter().peak()},
              {"packed_input_bytes", context.packed_input_bytes},
              {"flops", context.flops}};
      if (!context.sparsity_report) return;
      used["sparsity"] = context.sparsity_report->sparsity;
      used["audited_mass"] = context.sparsity_report->recovered_mass;
    });
    ATTN_RETURN_IF_ERROR(status);
    const MemoryUsage formula = implementation.WorkspaceBytes(shape, device_->executor().threads());
    used["workspace_formula_bytes"] = formula.bytes;
    return seconds;
  }

  SelectorOptions OptionsOfSelector(std::size_t workspace_limit) {
    SelectorOptions options;
    options.profile = &ProfileOfCpu(DescribeCpu().active);
    options.units = device_->executor().threads();
    options.workspace_limit = workspace_limit;
    options.available_bytes = &AvailableHostBytes;
    options.timings = &timings_;
    return options;
  }

  absl::StatusOr<json> Select(const json& request) {
    ATTN_ASSIGN_OR_RETURN(Problem* const problem, Find(request));
    const AttentionShape shape = ShapeOf(problem->Next());
    ATTN_ASSIGN_OR_RETURN(const Selection selection, selector_.Select({}, shape));
    std::vector<double> seconds;
    for (int i = 0; i < 101; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      ATTN_RETURN_IF_ERROR(selector_.Select({}, shape).status());
      seconds.push_back(
          std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    std::nth_element(seconds.begin(), seconds.begin() + 50, seconds.end());
    json candidates = json::array();
    for (const Candidate& candidate : selector_.Candidates(shape, false)) {
      candidates.push_back({{"implementation", candidate.row->name},
                            {"exact", candidate.row->traits.exact},
                            {"eligible", candidate.eligible},
                            {"estimated_seconds", candidate.estimated_seconds},
                            {"operations", candidate.operations},
                            {"workspace_bytes", candidate.workspace_bytes},
                            {"reason", candidate.reason}});
    }
    return json{{"implementation", selection.row->name},
                {"reason", selection.reason},
                {"cached_seconds", seconds[50]},
                {"candidates", std::move(candidates)}};
  }

  absl::StatusOr<json> Learn(const json& request) {
    ATTN_ASSIGN_OR_RETURN(Problem* const problem, Find(request));
    timings_.Record({request.at("implementation"), ShapeOf(problem->Next()),
                     request.at("seconds").get<double>()});
    return json::object();
  }

  absl::StatusOr<json> Recover(const json& request) {
    ATTN_ASSIGN_OR_RETURN(Problem* const problem, Find(request));
    ATTN_ASSIGN_OR_RETURN(const SparsityOptions sparsity, SparsityFrom(request.at("options")));
    absl::StatusOr<Recovery> recovery = Recovery{};
    device_->executor().Run([&] {
      workspace_.Reset();
      ExecutionContext context{*device_, workspace_, nullptr};
      recovery = MeasureRecovery(problem->Next(), sparsity, request.at("samples"), context);
    });
    if (!recovery.ok()) return recovery.status();
    return json{{"recovered_mass", recovery->recovered_mass},
                {"oracle_mass", recovery->oracle_mass},
                {"of_oracle", recovery->recovered_mass / recovery->oracle_mass},
                {"recovery_rows", recovery->rows}};
  }

  absl::StatusOr<json> CopyOutput(const json& request) {
    ATTN_ASSIGN_OR_RETURN(Problem* const problem, Find(request));
    const Buffer& output = problem->output();
    if (request.at("bytes").get<std::size_t>() != output.bytes) {
      return InvalidField("bytes", absl::StrCat("the output has ", output.bytes));
    }
    device_->Copy(Address<void>(request.at("to")), output.data.get(), output.bytes);
    return json::object();
  }

  static absl::StatusOr<json> LongDocument(const json& request) {
    const json& shape = request.at("shape");
    if (shape.at("q_len") != shape.at("kv_len")) return InvalidField("shape", "is not square");
    LongDocumentOptions options;
    options.batch = shape.at("batch");
    options.num_heads = shape.at("num_heads");
    options.num_kv_heads = shape.at("num_kv_heads");
    options.length = shape.at("q_len");
    options.head_dim = shape.at("head_dim");
    options.value_dim = shape.at("value_dim");
    options.seed = request.at("seed");
    MakeLongDocument(options, Address<float>(request.at("query")),
                     Address<float>(request.at("key")), Address<float>(request.at("value")));
    return json::object();
  }

  absl::StatusOr<json> Limit(const json& request) {
    const std::string which = request.at("which");
    const double per_second = which == "read"
                                  ? limits_.ReadBytesPerSecond()
                                  : limits_.FlopsPerSecond(which, request.value("seconds", 0.02));
    if (per_second <= 0) return OutOfMemory();
    return json{{"per_second", per_second}};
  }

  const std::unique_ptr<Device> device_;
  Workspace workspace_;
  MachineLimits limits_;
  MeasuredTimings timings_;
  Selector selector_;
  std::map<std::string, std::unique_ptr<Problem>> problems_;
  std::map<std::string, std::unique_ptr<AttentionImplementation>> implementations_;
  std::string reply_;
};

}  // namespace attn::bench

extern "C" {

void* attn_bench_open(int threads, uint64_t workspace_limit) {
  try {
    return new attn::bench::Bench(threads, workspace_limit);
  } catch (const std::exception&) {
    return nullptr;
  }
}

void attn_bench_close(void* bench) { delete static_cast<attn::bench::Bench*>(bench); }

const char* attn_bench_call(void* bench, const char* request) {
  return static_cast<attn::bench::Bench*>(bench)->Call(request);
}
}
