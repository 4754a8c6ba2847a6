#include "server/admin_handlers.h"

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/hardware.h"
#include "server/spec_codec.h"
#include "server/version.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

void DescribeModel(const ManagerPool& pool, const SessionTable::Usage& usage,
                   proto::ModelStatus& status) {
  *status.mutable_spec() = ToProto(pool.model()->spec());
  const std::shared_ptr<const Active> active = pool.active();
  status.set_active_implementation(active->name());
  status.set_reason(active->reason);
  for (const std::unique_ptr<AttentionManager>& manager : pool.managers()) {
    proto::ManagerStatus& message = *status.add_managers();
    message.set_device(manager->device().name());
    message.set_queued(manager->queued.load(std::memory_order_relaxed));
    message.set_executing(manager->executing.load(std::memory_order_relaxed));
  }
  status.set_requests(pool.requests.load(std::memory_order_relaxed));
  status.set_switches(pool.switches());
  status.set_weight_bytes(pool.model()->weight_bytes());
  status.set_sessions(usage.sessions);
  status.set_cache_bytes(usage.bytes);
}

}  // namespace

absl::Status HandleListModels(ServerState& state, const proto::ListModelsRequest&,
                              proto::ListModelsResponse& response) {
  const std::map<std::string, SessionTable::Usage> usages = state.sessions().UsageByModel();
  for (const std::shared_ptr<ManagerPool>& pool : state.registry().List()) {
    const auto usage = usages.find(pool->name());
    DescribeModel(*pool, usage == usages.end() ? SessionTable::Usage() : usage->second,
                  *response.add_models());
  }
  return absl::OkStatus();
}

absl::Status HandleLoadModel(ServerState& state, const proto::LoadModelRequest& request,
                             proto::LoadModelResponse& response) {
  ATTN_ASSIGN_OR_RETURN(const ModelSpec spec, FromProto(request.spec()));
  const std::string& root = state.options().model_root;
  if (!spec.weights.empty() && root.empty()) {
    return MakeError(absl::StatusCode::kFailedPrecondition, "NO_MODEL_ROOT",
                     "the server has no model root: it does not load weights on request");
  }
  ATTN_ASSIGN_OR_RETURN(const std::shared_ptr<ManagerPool> pool, state.registry().Load(spec, root));
  DescribeModel(*pool, SessionTable::Usage(), *response.mutable_model());
  return absl::OkStatus();
}

absl::Status HandleUnloadModel(ServerState& state, const proto::UnloadModelRequest& request,
                               proto::UnloadModelResponse&) {
  if (request.model().empty()) return InvalidField("model", "model is missing");
  ATTN_ASSIGN_OR_RETURN(const std::shared_ptr<ManagerPool> pool,
                        state.registry().Find(request.model()));
  std::uint64_t open = 0;
  if (!state.sessions().BeginUnload(*pool, request.close_sessions(), open)) {
    return MakeError(absl::StatusCode::kFailedPrecondition, "MODEL_HAS_SESSIONS",
                     absl::StrCat("model '", request.model(), "' has ", open,
                                  " open sessions: close them, or set close_sessions"),
                     {{"sessions", absl::StrCat(open)}});
  }
  absl::Status unloaded = state.registry().Unload(request.model());
  if (unloaded.ok()) state.sessions().CloseAll(*pool);
  state.sessions().EndUnload(*pool);
  return unloaded;
}

absl::Status HandleSwitchAttention(ServerState& state, const proto::SwitchAttentionRequest& request,
                                   proto::SwitchAttentionResponse& response) {
  if (request.implementation().empty())
    return InvalidField("implementation", "implementation is missing");
  ATTN_ASSIGN_OR_RETURN(const std::shared_ptr<ManagerPool> pool,
                        state.registry().Find(request.model()));
  ATTN_ASSIGN_OR_RETURN(const SwitchOutcome outcome,
                        pool->SwitchAttention(request.implementation()));
  response.set_switched(outcome.switched);
  response.set_previous(outcome.previous);
  response.set_active(outcome.active);
  response.set_reason(outcome.reason);
  if (outcome.previous != outcome.active) {
    state.metrics().RecordSwitch(pool->name(), outcome.previous, outcome.active);
  }
  return absl::OkStatus();
}

absl::Status HandleListImplementations(ServerState& state, const proto::ListImplementationsRequest&,
                                       proto::ListImplementationsResponse& response) {
  for (const ImplementationRow& row : state.registry().table()) {
    proto::Implementation& message = *response.add_implementations();
    message.set_name(row.name);
    for (const std::string& backend : row.traits.backends) message.add_backends(backend);
    for (DType dtype : row.traits.dtypes) message.add_dtypes(ToProto(dtype));
    message.set_exact(row.traits.exact);
    message.set_outputs_attentions(row.traits.outputs_attentions);
    message.set_memory(row.traits.memory);
    message.set_compute(row.traits.compute);
    message.set_description(row.traits.description);
  }
  return absl::OkStatus();
}

absl::Status HandleGetHardware(ServerState& state, const proto::GetHardwareRequest&,
                               proto::GetHardwareResponse& response) {
  const HardwareDescription hardware = state.options().hardware->Describe();
  const CpuHardware& cpu = hardware.cpu;
  proto::Cpu& message = *response.mutable_cpu();
  message.set_model(cpu.model);
  message.set_cores(static_cast<std::uint32_t>(cpu.cores));
  message.set_memory_bytes(cpu.memory_bytes);
  message.set_available_bytes(cpu.available_bytes);
  for (const std::string& feature : cpu.features) message.add_features(feature);
  message.set_active(cpu.active);
  for (const GpuHardware& gpu : hardware.gpus) {
    proto::Gpu& described = *response.add_gpus();
    described.set_name(gpu.name);
    described.set_compute_capability(absl::StrCat(gpu.major, ".", gpu.minor));
    described.set_tensor_cores(gpu.tensor_cores);
    described.set_memory_bytes(gpu.memory_bytes);
    described.set_free_bytes(gpu.free_bytes);
    described.set_multiprocessors(static_cast<std::uint32_t>(gpu.multiprocessors));
  }
  return absl::OkStatus();
}

absl::Status HandleGetServerInfo(ServerState& state, const proto::GetServerInfoRequest&,
                                 proto::GetServerInfoResponse& response) {
  response.set_version(kVersion);
  response.set_server_epoch(state.epoch());
  response.set_shared_memory(false);
  response.set_max_request_bytes(state.limits().max_message_bytes);
  response.set_max_response_bytes(state.limits().max_message_bytes);
  response.set_max_tokens(static_cast<std::uint64_t>(state.limits().max_tokens));
  response.set_max_stream_requests(static_cast<std::uint32_t>(state.limits().max_stream_requests));
  response.set_max_stream_bytes(state.limits().max_stream_bytes);
  return absl::OkStatus();
}

}  // namespace attn::server
