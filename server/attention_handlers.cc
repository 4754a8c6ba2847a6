#include "server/attention_handlers.h"

#include <chrono>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/cache_append.h"
#include "core/cache_call.h"
#include "core/checked_math.h"
#include "core/error.h"
#include "core/projected_attention.h"
#include "core/selector.h"
#include "server/session_handlers.h"

namespace attn::server {
namespace {

// Of an answer, beside its tensors: shapes, execution facts.
constexpr std::uint64_t kEnvelopeBytes = 4096;

// A label's value; of a modality that nothing says, none.
std::string ModalityLabel(Modality modality) {
  return modality == Modality::kUnspecified ? "" : ModalityName(modality);
}

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// One call between its checks and its answer.
struct Pending {
  std::shared_ptr<ManagerPool> pool;
  AttentionManager* manager = nullptr;
  SelectionRequest selection;
  AttentionShape shape;
  AttentionProblem::Outputs outputs;
  // Computes into the answer's tensors.
  std::function<absl::Status(const Choice&, AttentionAnswer&, ExecutionContext&)> execute;
  std::size_t problem_bytes = 0;     // of the lists that the checks made
  std::shared_ptr<CacheCall> cache;  // of rows in sessions, in their turn; null: none
  std::shared_ptr<SessionLanes::Turn> turn;
  std::int32_t priority = 0;
  SparsityOptions sparsity;         // the request's, else the model's
  std::uint64_t memory_budget = 0;  // of memory_efficient
  std::shared_ptr<CallContext> context;
  AttentionDone done;
};

// The next call on the same sessions has its turn before this one's caller is told.
void Complete(Pending& pending, absl::StatusOr<AttentionAnswer> answer) {
  pending.cache.reset();
  pending.turn.reset();
  pending.done(std::move(answer));
}

absl::Status CheckSparsity(ImplementationTable table, const ExecutionRequest& request) {
  const SparsityOptions& sparsity = request.sparsity;
  if (sparsity.factor && !(*sparsity.factor >= 0.0 && *sparsity.factor < 1.0)) {
    return InvalidField(
        "execution.sparsity.factor",
        absl::StrCat("execution.sparsity.factor is ", *sparsity.factor, ", but must be in [0, 1)"));
  }
  if (sparsity.mass && !(*sparsity.mass > 0.0 && *sparsity.mass <= 1.0)) {
    return InvalidField(
        "execution.sparsity.mass",
        absl::StrCat("execution.sparsity.mass is ", *sparsity.mass, ", but must be in (0, 1]"));
  }
  if (request.implementation.empty() || request.implementation == kAutoImplementation)
    return absl::OkStatus();
  ATTN_ASSIGN_OR_RETURN(const ImplementationRow* const row,
                        RequireImplementation(table, request.implementation));
  if (row->traits.exact && sparsity.set()) {
    return InvalidField(
        "execution.sparsity",
        absl::StrCat("execution.sparsity is set, but ", row->name, " is an exact implementation"));
  }
  return absl::OkStatus();
}

absl::Status AllocateOutput(Device& device, const OutputSpec& spec, OutputTensor& tensor) {
  if (!spec.defined()) return absl::OkStatus();
  ATTN_ASSIGN_OR_RETURN(tensor.buffer, device.Allocate(spec.bytes()));
  tensor.view = MutableTensorView(tensor.buffer.data.get(), spec.dtype, spec.shape.data(),
                                  static_cast<int>(spec.shape.size()));
  return absl::OkStatus();
}

absl::StatusOr<AttentionAnswer> Execute(Pending& pending) {
  AttentionManager& manager = *pending.manager;
  Workspace& workspace = manager.workspace();
  AttentionAnswer answer;
  answer.execution.queue_seconds = SecondsSince(pending.context->arrival);
  pending.selection.active = pending.pool->active()->row;
  ATTN_ASSIGN_OR_RETURN(const Choice choice,
                        manager.SelectAttentionModule(pending.selection, pending.shape));
  Device& device = manager.device();
  const AttentionProblem::Outputs& outputs = pending.outputs;
  ATTN_RETURN_IF_ERROR(AllocateOutput(device, outputs.output, answer.output));
  ATTN_RETURN_IF_ERROR(AllocateOutput(device, outputs.attention_weights, answer.attention_weights));
  ATTN_RETURN_IF_ERROR(AllocateOutput(device, outputs.lse, answer.lse));
  ATTN_RETURN_IF_ERROR(AllocateOutput(device, outputs.present_key, answer.present_key));
  ATTN_RETURN_IF_ERROR(AllocateOutput(device, outputs.present_value, answer.present_value));

  workspace.Reset();
  ExecutionContext execution{device, workspace, pending.context->cancelled_flag()};
  execution.sparsity = pending.sparsity;
  execution.memory_budget = pending.memory_budget;
  const Clock::time_point start = Clock::now();
  const absl::Status status = pending.execute(choice, answer, execution);
  ExecutionFacts& facts = answer.execution;
  facts.compute_seconds = SecondsSince(start);
  facts.peak_workspace_bytes = workspace.meter().peak();
  workspace.Reset();
  ATTN_RETURN_IF_ERROR(status);
  ATTN_RETURN_IF_ERROR(
      pending.context->Wanted());  // a result that nobody waits for may be unfinished
  facts.implementation = choice.selection.row->name;
  facts.backend = device.backend();
  facts.reason = choice.selection.reason;
  facts.packed_input_bytes = execution.packed_input_bytes;
  facts.flops = execution.flops;
  facts.sparsity = execution.sparsity_report;

  CallFacts& recorded = pending.context->facts;
  recorded.executed = true;
  recorded.implementation = facts.implementation;
  recorded.fell_back = choice.selection.fell_back;
  recorded.queue_seconds = facts.queue_seconds;
  recorded.compute_seconds = facts.compute_seconds;
  recorded.peak_workspace_bytes = facts.peak_workspace_bytes;
  if (pending.cache != nullptr) {
    answer.cache_length = pending.cache->CacheLengths();
    recorded.cached_tokens = pending.cache->appended_tokens();
    pending.cache->Commit();  // last: what can fail did not
  }
  return answer;
}

// Admission: the answer must fit into a message and into the budget, the queue must have room.
void Submit(ServerState& state, std::shared_ptr<Pending> pending) {
  // A varint of each row's cache length goes beside the tensors.
  constexpr std::uint64_t kLengthBytes = 10;
  const std::uint64_t rows = pending->cache == nullptr ? 0 : pending->cache->rows().lengths.size();
  const std::uint64_t bytes = SaturatingAdd(pending->outputs.bytes(), rows * kLengthBytes);
  const std::uint64_t limit = state.limits().max_message_bytes;
  if (bytes > limit - std::min(limit, kEnvelopeBytes)) {
    return Complete(
        *pending,
        MakeError(absl::StatusCode::kInvalidArgument, "ANSWER_TOO_LARGE",
                  absl::StrCat("the answer would have ", bytes,
                               " bytes of tensors, more than the largest message, ", limit),
                  {{"bytes", absl::StrCat(bytes)}, {"max_response_bytes", absl::StrCat(limit)}}));
  }
  if (pending->context->answer_budget != nullptr) {
    absl::StatusOr<MemoryBudget::Reservation> share =
        pending->context->answer_budget->Reserve(bytes);
    if (!share.ok()) return Complete(*pending, share.status());
    pending->context->Hold(*std::move(share));
  }
  absl::StatusOr<MemoryBudget::Reservation> reservation =
      state.budget().Reserve(bytes + pending->problem_bytes);
  if (!reservation.ok()) return Complete(*pending, reservation.status());
  pending->context->Hold(*std::move(reservation));
  pending->manager = &pending->pool->PickManager();
  pending->pool->requests.fetch_add(1, std::memory_order_relaxed);
  pending->manager->queued.fetch_add(1, std::memory_order_relaxed);

  DeviceQueue::Job job;
  job.call = pending->context;
  job.priority = pending->priority;
  job.run = [pending] {
    AttentionManager& manager = *pending->manager;
    manager.queued.fetch_sub(1, std::memory_order_relaxed);
    manager.executing.fetch_add(1, std::memory_order_relaxed);
    absl::StatusOr<AttentionAnswer> answer = GuardMemory([&] { return Execute(*pending); });
    manager.executing.fetch_sub(1, std::memory_order_relaxed);
    Complete(*pending, std::move(answer));
  };
  job.drop = [pending](absl::Status status) {
    pending->manager->queued.fetch_sub(1, std::memory_order_relaxed);
    Complete(*pending, std::move(status));
  };
  absl::Status pushed = state.queue(pending->manager->device()).Push(std::move(job));
  if (!pushed.ok()) {
    pending->manager->queued.fetch_sub(1, std::memory_order_relaxed);
    Complete(*pending, std::move(pushed));
  }
}

// What a call needs before its turn: its model's pool, checked options.
absl::StatusOr<std::shared_ptr<Pending>> MakePending(ServerState& state, const LayerRef& layer,
                                                     const ExecutionRequest& execution,
                                                     const std::shared_ptr<CallContext>& context) {
  ATTN_RETURN_IF_ERROR(context->Wanted());
  auto pending = std::make_shared<Pending>();
  ATTN_ASSIGN_OR_RETURN(pending->pool, state.registry().Find(layer.model));
  context->facts.model = layer.model;
  ATTN_RETURN_IF_ERROR(CheckSparsity(state.registry().table(), execution));
  pending->selection.named = execution.implementation;
  pending->priority = execution.priority;
  const HostedModel* const model = pending->pool->model();
  pending->selection.allow_approximate =
      (model != nullptr && model->spec().allow_approximate) || execution.sparsity.set();
  pending->memory_budget = state.limits().memory_efficient_bytes;
  pending->sparsity = execution.sparsity;
  if (model != nullptr) context->facts.modality = ModalityLabel(ModalityOf(model->spec(), layer));
  if (model != nullptr) pending->sparsity = Override(model->spec().sparsity, execution.sparsity);
  pending->context = context;
  return pending;
}

// The layer that the call names; null without a model.
absl::StatusOr<const HostedLayer*> FindLayer(const ManagerPool& pool, const LayerRef& ref) {
  if (pool.model() == nullptr) return nullptr;
  return pool.model()->Find(ref);
}

// A stack that is a model's only one has two names: the cache has one.
CacheKey KeyOf(const ManagerPool& pool, const LayerRef& ref) {
  CacheKey key{ref.stack, ref.layer, ref.kind};
  if (pool.model() != nullptr && pool.model()->spec().stacks.size() == 1) {
    key.stack = pool.model()->spec().stacks.front().name;
  }
  return key;
}

absl::Status BeginCacheCall(Pending& pending, const LayerRef& ref, const HostedLayer* layer,
                            const CacheRequest& request) {
  ATTN_ASSIGN_OR_RETURN(
      pending.cache,
      CacheCall::Create(pending.turn->sessions(), KeyOf(*pending.pool, ref), layer, request));
  return absl::OkStatus();
}

absl::Status PrepareAttend(ServerState& state, AttendCall call, Pending& pending) {
  ATTN_ASSIGN_OR_RETURN(const HostedLayer* const layer, FindLayer(*pending.pool, call.layer));
  if (call.sessions) {
    ATTN_RETURN_IF_ERROR(BeginCacheCall(pending, call.layer, layer, call.sessions->request));
    call.inputs.cache = &pending.cache->rows();
  }
  ATTN_ASSIGN_OR_RETURN(
      AttentionProblem created,
      AttentionProblem::Create(call.inputs, layer == nullptr ? nullptr : layer->spec.get(),
                               state.limits().max_tokens));
  auto problem = std::make_shared<AttentionProblem>(std::move(created));
  pending.shape = problem->shape();
  pending.shape.sparsity = pending.sparsity;
  pending.outputs = problem->outputs();
  pending.problem_bytes = problem->owned_bytes();
  pending.execute = [problem, cache = pending.cache.get(), storage = call.storage](
                        const Choice& choice, AttentionAnswer& answer,
                        ExecutionContext& execution) -> absl::Status {
    if (cache != nullptr) {
      ATTN_RETURN_IF_ERROR(ReserveCache(*problem, *cache));
      AppendToCache(*problem, *cache, execution.device.executor());
    }
    problem->Bind({answer.output.view, answer.attention_weights.view, answer.lse.view,
                   answer.present_key.view, answer.present_value.view});
    return choice.implementation->Attend(problem->args(), problem->shape(), execution);
  };
  return absl::OkStatus();
}

absl::Status PrepareForward(ServerState& state, ForwardCall call, Pending& pending) {
  if (pending.pool->model() == nullptr)
    return InvalidField("layer.model", "layer.model is missing: Forward needs a hosted model");
  ATTN_ASSIGN_OR_RETURN(const HostedLayer* const layer, FindLayer(*pending.pool, call.layer));
  ATTN_RETURN_IF_ERROR(RequireWeights(*layer, call.layer.model));
  if (call.sessions) {
    ATTN_RETURN_IF_ERROR(BeginCacheCall(pending, call.layer, layer, call.sessions->request));
    call.inputs.cache = pending.cache.get();
  }
  const std::int64_t max_tokens = state.limits().max_tokens;
  ATTN_ASSIGN_OR_RETURN(ForwardPlan plan,
                        ProjectedAttention(*layer, nullptr, max_tokens).Plan(call.inputs));
  pending.shape = plan.shape;
  pending.shape.sparsity = pending.sparsity;
  pending.outputs = std::move(plan.outputs);
  // The pool, kept by `pending`, keeps the layer.
  pending.execute = [layer, max_tokens, inputs = std::move(call.inputs), storage = call.storage](
                        const Choice& choice, AttentionAnswer& answer,
                        ExecutionContext& execution) {
    const ProjectedAttention module(*layer, choice.implementation, max_tokens);
    return module.Forward(inputs,
                          {answer.output.view, answer.attention_weights.view,
                           answer.present_key.view, answer.present_value.view},
                          execution);
  };
  return absl::OkStatus();
}

// A call without sessions is prepared at once; one with sessions when its turn comes, since what it
// means depends on what the calls before it left in them.
template <typename Call>
void Handle(ServerState& state, Call call, std::shared_ptr<CallContext> context, AttentionDone done,
            absl::Status (*prepare)(ServerState&, Call, Pending&)) {
  absl::StatusOr<std::shared_ptr<Pending>> made =
      GuardMemory([&] { return MakePending(state, call.layer, call.execution, context); });
  if (!made.ok()) return done(made.status());
  const std::shared_ptr<Pending> pending = *std::move(made);
  pending->done = std::move(done);
  const auto go = [&state, pending, prepare](Call ready) {
    const absl::Status prepared =
        GuardMemory([&] { return prepare(state, std::move(ready), *pending); });
    if (!prepared.ok()) return Complete(*pending, prepared);
    Submit(state, pending);
  };
  if (!call.sessions) return go(std::move(call));
  auto sessions =
      GuardMemory([&] { return FindSessions(state, call.sessions->ids, *pending->pool); });
  if (!sessions.ok()) return Complete(*pending, sessions.status());
  state.lanes().Enter(
      *std::move(sessions), std::move(context),
      [pending, go,
       held = std::make_shared<Call>(std::move(call))](std::shared_ptr<SessionLanes::Turn> turn) {
        pending->turn = std::move(turn);
        go(std::move(*held));
      },
      [pending](absl::Status status) { Complete(*pending, std::move(status)); });
}

}  // namespace

void HandleAttend(ServerState& state, AttendCall call, std::shared_ptr<CallContext> context,
                  AttentionDone done) {
  Handle(state, std::move(call), std::move(context), std::move(done), &PrepareAttend);
}

void HandleForward(ServerState& state, ForwardCall call, std::shared_ptr<CallContext> context,
                   AttentionDone done) {
  Handle(state, std::move(call), std::move(context), std::move(done), &PrepareForward);
}

}  // namespace attn::server
