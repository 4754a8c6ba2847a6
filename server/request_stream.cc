#include "server/request_stream.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn::server {
namespace {

const Rpc& RpcOf(StreamRequestKind kind) {
  switch (kind) {
    case StreamRequestKind::kForward:
      return rpcs::kStreamForward;
    case StreamRequestKind::kAttend:
      return rpcs::kStreamAttend;
    case StreamRequestKind::kOpen:
      return rpcs::kStreamOpen;
    case StreamRequestKind::kFork:
      return rpcs::kStreamFork;
    default:
      return rpcs::kStreamClose;
  }
}

// Sums with longer ones would overflow.
constexpr double kForeverSeconds = 10.0 * 365 * 24 * 3600;

Clock::time_point DeadlineOf(double timeout_seconds, Clock::time_point bound) {
  if (timeout_seconds == 0.0 || timeout_seconds > kForeverSeconds) return bound;
  return std::min(bound, Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                            std::chrono::duration<double>(timeout_seconds)));
}

}  // namespace

// A request's share of the stream's limits, and its context, which holds its memory.
struct RequestStream::Held {
  Held(std::shared_ptr<RequestStream> owner, std::uint64_t request_bytes)
      : stream(std::move(owner)), bytes(request_bytes) {}
  ~Held() {
    if (!counted) return;
    std::lock_guard lock(stream->mutex_);
    --stream->held_requests_;
    stream->held_bytes_ -= bytes;
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  const std::shared_ptr<RequestStream> stream;
  const std::uint64_t bytes;
  std::shared_ptr<CallContext> context;
  bool counted = false;
};

absl::Status RequestStream::Admit(const StreamEnvelope& envelope,
                                  const std::shared_ptr<CallContext>& context,
                                  std::shared_ptr<Held>& held) {
  const std::size_t max_requests = state_.limits().max_stream_requests;
  const std::uint64_t max_bytes = state_.limits().max_stream_bytes;
  std::lock_guard lock(mutex_);
  if (pending_.count(envelope.id) != 0) {
    return MakeError(absl::StatusCode::kInvalidArgument, "DUPLICATE_ID",
                     absl::StrCat("id is ", envelope.id,
                                  ", which is that of a request that is not answered yet"),
                     {{"field", "id"}});
  }
  const std::uint64_t bytes = envelope.request.size;
  if (held_requests_ >= max_requests || bytes > max_bytes || held_bytes_ > max_bytes - bytes) {
    absl::Status full = MakeError(
        absl::StatusCode::kResourceExhausted, "STREAM_LIMIT",
        absl::StrCat("the stream has ", held_requests_, " unanswered requests with ", held_bytes_,
                     " bytes; the limits are ", max_requests, " and ", max_bytes));
    if (bytes <= max_bytes) SetRetryDelay(full, 0.01);
    return full;
  }
  held = std::make_shared<Held>(shared_from_this(), bytes);
  held->context = context;
  Pending& pending = pending_[envelope.id];
  pending.context = context;
  held->counted = true;
  ++held_requests_;
  held_bytes_ += bytes;
  if (context->deadline != Clock::time_point::max()) {
    pending.timed = true;
    pending.timer =
        state_.timer().At(context->deadline, [weak = std::weak_ptr<CallContext>(context)] {
          if (const std::shared_ptr<CallContext> late = weak.lock()) late->Cancel();
        });
  }
  if (cancelled_) context->Cancel();
  return absl::OkStatus();
}

bool RequestStream::OnMessage(const RequestBytes& bytes) {
  const StreamEnvelope envelope = ReadStreamEnvelope(bytes);
  if (envelope.status.ok() && envelope.kind == StreamRequestKind::kCancel) {
    CancelRequest(envelope.cancel);
    return false;
  }
  std::shared_ptr<Held> held;
  absl::Status admitted = envelope.status;
  std::shared_ptr<CallContext> context;
  if (admitted.ok()) {
    context = std::make_shared<CallContext>(DeadlineOf(envelope.timeout_seconds, deadline_));
    context->answer_budget = answers_;
    admitted = GuardMemory([&] { return Admit(envelope, context, held); });
  }
  if (!admitted.ok()) {
    write_({StreamError(envelope.id, admitted), nullptr, nullptr});
    return true;
  }
  dispatcher_.Dispatch(RpcOf(envelope.kind), envelope.request, std::move(context),
                       [self = shared_from_this(), id = envelope.id, kind = envelope.kind,
                        held = std::make_shared<std::shared_ptr<Held>>(std::move(held))](
                           const absl::Status& status, Answer answer) {
                         // Copies of this function must not keep the request's share of the limits.
                         self->OnAnswer(id, kind, status, std::move(answer), std::move(*held));
                       });
  return true;
}

void RequestStream::OnAnswer(std::uint64_t id, StreamRequestKind kind, const absl::Status& status,
                             Answer answer, std::shared_ptr<Held> held) {
  Pending pending;
  {
    std::lock_guard lock(mutex_);
    const auto found = pending_.find(id);
    pending = std::move(found->second);
    // The id is free when its answer is given away, not when it has arrived: the caller may be
    // faster than what tells us.
    pending_.erase(found);
  }
  if (pending.timed) state_.timer().Cancel(pending.timer);
  // An error is small, whatever its request had memory for.
  pending.context.reset();
  if (!status.ok()) held->context.reset();
  std::shared_ptr<CallContext> context = held->context;
  write_({status.ok() ? WrapStreamAnswer(id, kind, std::move(answer)) : StreamError(id, status),
          std::move(context), std::move(held)});
}

void RequestStream::CancelRequest(std::uint64_t id) {
  std::shared_ptr<CallContext> context;
  {
    std::lock_guard lock(mutex_);
    const auto found = pending_.find(id);
    if (found == pending_.end()) return;
    context = found->second.context;
  }
  context->Cancel();
}

void RequestStream::Cancel() {
  std::vector<std::shared_ptr<CallContext>> contexts;
  {
    std::lock_guard lock(mutex_);
    cancelled_ = true;
    for (const auto& [id, pending] : pending_) contexts.push_back(pending.context);
  }
  for (const std::shared_ptr<CallContext>& context : contexts) context->Cancel();
}

}  // namespace attn::server
