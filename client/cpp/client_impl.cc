#include "client/cpp/client_impl.h"

#include <algorithm>
#include <optional>

namespace attn::client {
namespace {

namespace v1 = attention::v1;

constexpr char kErrorMetadata[] = "attention-error-bin";
constexpr char kErrorPayload[] = "type.googleapis.com/attention.v1.Error";

std::optional<v1::Error> ServerError(const grpc::ClientContext& context) {
  const auto& metadata = context.GetServerTrailingMetadata();
  const auto entry = metadata.find(kErrorMetadata);
  v1::Error error;
  if (entry == metadata.end() ||
      !error.ParseFromArray(entry->second.data(), static_cast<int>(entry->second.size()))) {
    return std::nullopt;
  }
  return error;
}

}  // namespace

absl::Status ToAbslStatus(const grpc::Status& status, const grpc::ClientContext& context,
                          const std::string& address) {
  const auto code = static_cast<absl::StatusCode>(status.error_code());
  if (const std::optional<v1::Error> error = ServerError(context)) {
    absl::Status result(code, status.error_message());
    result.SetPayload(kErrorPayload, absl::Cord(error->SerializeAsString()));
    return result;
  }
  // UNAVAILABLE without an Error is gRPC's own: connection refused, no such host, connection lost.
  if (code == absl::StatusCode::kUnavailable) {
    return absl::UnavailableError(
        absl::StrCat("no answer from ", address, ": ", status.error_message()));
  }
  return absl::Status(code, status.error_message());
}

ClientError ErrorOf(const absl::Status& status) {
  ClientError error;
  error.code = status.code();
  error.message = std::string(status.message());
  const auto payload = status.GetPayload(kErrorPayload);
  v1::Error wire;
  if (!payload || !wire.ParseFromString(std::string(*payload))) return error;
  error.answered = true;
  error.reason = wire.reason();
  error.retry_delay_seconds = wire.retry_delay_seconds();
  error.details.insert(wire.details().begin(), wire.details().end());
  return error;
}

absl::Status WithAttempts(const absl::Status& status, int attempts) {
  if (attempts <= 1) return status;
  absl::Status result(status.code(),
                      absl::StrCat(status.message(), " (after ", attempts, " attempts)"));
  status.ForEachPayload([&result](absl::string_view type, const absl::Cord& payload) {
    result.SetPayload(type, payload);
  });
  return result;
}

Client::Impl::Impl(const std::string& address, const ClientOptions& options)
    : address_(address),
      options_(options),
      channel_(CreateChannel(address, options.channel, options.max_message_bytes)),
      attention_(v1::AttentionService::NewStub(channel_)),
      admin_(v1::AdminService::NewStub(channel_)) {}

int Client::Impl::CancelCalls() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Operation* operation : running_) {
    operation->cancelled_ = true;
    if (operation->context_ != nullptr) operation->context_->TryCancel();
  }
  cancelled_.notify_all();
  return static_cast<int>(running_.size());
}

absl::Status Client::Impl::CheckSize(const google::protobuf::Message& request) const {
  const size_t bytes = request.ByteSizeLong();
  if (bytes <= static_cast<size_t>(options_.max_message_bytes)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "the request has ", bytes, " bytes; a message may have ", options_.max_message_bytes));
}

absl::Time Client::Impl::AttemptDeadline(const RetryPolicy& policy, const Operation& operation) {
  if (policy.attempt_timeout_seconds <= 0) return operation.deadline();
  return std::min(operation.deadline(),
                  absl::Now() + absl::Seconds(policy.attempt_timeout_seconds));
}

void Client::Impl::SetDeadline(grpc::ClientContext& context, absl::Time deadline) {
  if (deadline == absl::InfiniteFuture()) return;
  // A year stands for all that is longer: the clock's own arithmetic overflows at 292.
  const absl::Time year = absl::Now() + absl::Hours(365 * 24);
  context.set_deadline(absl::ToChronoTime(std::min(deadline, year)));
}

Client::Impl::Operation::Operation(Impl& impl, const CallOptions& options) : impl_(impl) {
  const double seconds = options.timeout_seconds.value_or(impl.options_.timeout_seconds);
  deadline_ = seconds > 0 ? absl::Now() + absl::Seconds(seconds) : absl::InfiniteFuture();
  const std::lock_guard<std::mutex> lock(impl_.mutex_);
  impl_.running_.insert(this);
}

Client::Impl::Operation::~Operation() {
  const std::lock_guard<std::mutex> lock(impl_.mutex_);
  impl_.running_.erase(this);
}

bool Client::Impl::Operation::WaitToRetry(const RetryOptions& retry, const absl::Status& status,
                                          int attempt) {
  const absl::Time now = absl::Now();
  // Callers that failed together differ in the clock's last digits.
  const double fraction = static_cast<double>(absl::ToUnixNanos(now) / 64 % 1024) / 1024;
  const std::optional<double> delay =
      RetryDelay(retry.policy, retry.repeatable, status, attempt, fraction);
  if (!delay || now + absl::Seconds(*delay) >= deadline_) return false;
  const auto until = absl::ToChronoTime(now + absl::Seconds(*delay));
  std::unique_lock<std::mutex> lock(impl_.mutex_);
  return !impl_.cancelled_.wait_until(lock, until, [this] { return cancelled_; });
}

bool Client::Impl::Operation::Cancelled() const {
  const std::lock_guard<std::mutex> lock(impl_.mutex_);
  return cancelled_;
}

Client::Impl::Registration::Registration(Operation& operation, grpc::ClientContext& context)
    : operation_(operation) {
  const std::lock_guard<std::mutex> lock(operation.impl_.mutex_);
  operation.context_ = &context;
  if (operation.cancelled_) context.TryCancel();
}

Client::Impl::Registration::~Registration() {
  const std::lock_guard<std::mutex> lock(operation_.impl_.mutex_);
  operation_.context_ = nullptr;
}

}  // namespace attn::client
