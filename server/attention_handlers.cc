#include "server/attention_handlers.h"

#include <chrono>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/projected_attention.h"
#include "core/selector.h"

namespace attn::server {
namespace {

// Of an answer, beside its tensors: shapes, execution facts.
constexpr std::uint64_t kEnvelopeBytes = 4096;

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
  std::size_t problem_bytes = 0;  // of the lists that the checks made
  std::int32_t priority = 0;
  std::shared_ptr<CallContext> context;
  AttentionDone done;
};

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
  if (row->traits.exact && (sparsity.factor || sparsity.mass)) {
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

  CallFacts& recorded = pending.context->facts;
  recorded.executed = true;
  recorded.implementation = facts.implementation;
  recorded.fell_back = choice.selection.fell_back;
  recorded.queue_seconds = facts.queue_seconds;
  recorded.compute_seconds = facts.compute_seconds;
  recorded.peak_workspace_bytes = facts.peak_workspace_bytes;
  return answer;
}

// Admission: the answer must fit into a message and into the budget, the queue must have room.
void Submit(ServerState& state, std::shared_ptr<Pending> pending) {
  const std::uint64_t bytes = pending->outputs.bytes();
  const std::uint64_t limit = state.limits().max_message_bytes;
  if (bytes > limit - std::min(limit, kEnvelopeBytes)) {
    return pending->done(
        MakeError(absl::StatusCode::kInvalidArgument, "ANSWER_TOO_LARGE",
                  absl::StrCat("the answer would have ", bytes,
                               " bytes of tensors, more than the largest message, ", limit),
                  {{"bytes", absl::StrCat(bytes)}, {"max_response_bytes", absl::StrCat(limit)}}));
  }
  absl::StatusOr<MemoryBudget::Reservation> reservation =
      state.budget().Reserve(bytes + pending->problem_bytes);
  if (!reservation.ok()) return pending->done(reservation.status());
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
    pending->done(std::move(answer));
  };
  job.drop = [pending](absl::Status status) {
    pending->manager->queued.fetch_sub(1, std::memory_order_relaxed);
    pending->done(std::move(status));
  };
  absl::Status pushed = state.queue(pending->manager->device()).Push(std::move(job));
  if (!pushed.ok()) {
    pending->manager->queued.fetch_sub(1, std::memory_order_relaxed);
    pending->done(std::move(pushed));
  }
}

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
  pending->selection.allow_approximate = (model != nullptr && model->spec().allow_approximate) ||
                                         execution.sparsity.factor || execution.sparsity.mass;
  pending->context = context;
  return pending;
}

absl::StatusOr<std::shared_ptr<Pending>> PrepareAttend(
    ServerState& state, AttendCall call, const std::shared_ptr<CallContext>& context) {
  ATTN_ASSIGN_OR_RETURN(std::shared_ptr<Pending> pending,
                        MakePending(state, call.layer, call.execution, context));
  const HostedLayer* layer = nullptr;
  if (pending->pool->model() != nullptr) {
    ATTN_ASSIGN_OR_RETURN(layer, pending->pool->model()->Find(call.layer));
  }
  ATTN_ASSIGN_OR_RETURN(
      AttentionProblem created,
      AttentionProblem::Create(call.inputs, layer == nullptr ? nullptr : layer->spec.get(),
                               state.limits().max_tokens));
  auto problem = std::make_shared<AttentionProblem>(std::move(created));
  pending->shape = problem->shape();
  pending->outputs = problem->outputs();
  pending->problem_bytes = problem->owned_bytes();
  pending->execute = [problem, storage = call.storage](const Choice& choice,
                                                       AttentionAnswer& answer,
                                                       ExecutionContext& execution) {
    problem->Bind({answer.output.view, answer.attention_weights.view, answer.lse.view,
                   answer.present_key.view, answer.present_value.view});
    return choice.implementation->Attend(problem->args(), problem->shape(), execution);
  };
  return pending;
}

absl::StatusOr<std::shared_ptr<Pending>> PrepareForward(
    ServerState& state, ForwardCall call, const std::shared_ptr<CallContext>& context) {
  ATTN_ASSIGN_OR_RETURN(std::shared_ptr<Pending> pending,
                        MakePending(state, call.layer, call.execution, context));
  const HostedModel* const model = pending->pool->model();
  if (model == nullptr)
    return InvalidField("layer.model", "layer.model is missing: Forward needs a hosted model");
  ATTN_ASSIGN_OR_RETURN(const HostedLayer* const layer, model->Find(call.layer));
  ATTN_RETURN_IF_ERROR(RequireWeights(*layer, call.layer.model));
  const std::int64_t max_tokens = state.limits().max_tokens;
  ATTN_ASSIGN_OR_RETURN(ForwardPlan plan,
                        ProjectedAttention(*layer, nullptr, max_tokens).Plan(call.inputs));
  pending->shape = plan.shape;
  pending->outputs = std::move(plan.outputs);
  // The pool, kept by `pending`, keeps the layer.
  pending->execute = [layer, max_tokens, inputs = std::move(call.inputs), storage = call.storage](
                         const Choice& choice, AttentionAnswer& answer,
                         ExecutionContext& execution) {
    const ProjectedAttention module(*layer, choice.implementation, max_tokens);
    return module.Forward(inputs,
                          {answer.output.view, answer.attention_weights.view,
                           answer.present_key.view, answer.present_value.view},
                          execution);
  };
  return pending;
}

void SubmitOrFail(ServerState& state, absl::StatusOr<std::shared_ptr<Pending>> pending,
                  AttentionDone done) {
  if (!pending.ok()) return done(pending.status());
  (*pending)->done = std::move(done);
  Submit(state, *std::move(pending));
}

}  // namespace

void HandleAttend(ServerState& state, AttendCall call, std::shared_ptr<CallContext> context,
                  AttentionDone done) {
  SubmitOrFail(state, GuardMemory([&] { return PrepareAttend(state, std::move(call), context); }),
               std::move(done));
}

void HandleForward(ServerState& state, ForwardCall call, std::shared_ptr<CallContext> context,
                   AttentionDone done) {
  SubmitOrFail(state, GuardMemory([&] { return PrepareForward(state, std::move(call), context); }),
               std::move(done));
}

}  // namespace attn::server
