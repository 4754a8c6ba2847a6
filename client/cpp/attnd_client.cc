#include "client/cpp/attnd_client.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "attention/v1/admin.grpc.pb.h"
#include "attention/v1/attention.grpc.pb.h"

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

}  // namespace

ClientError ErrorOf(const absl::Status& status) {
  ClientError error;
  error.code = status.code();
  error.message = std::string(status.message());
  const auto payload = status.GetPayload(kErrorPayload);
  v1::Error wire;
  if (!payload || !wire.ParseFromString(std::string(*payload))) return error;
  error.reason = wire.reason();
  error.retry_delay_seconds = wire.retry_delay_seconds();
  error.details.insert(wire.details().begin(), wire.details().end());
  return error;
}

absl::Status CheckAddress(const std::string& address) {
  if (absl::StartsWith(address, "unix:")) {
    if (address.size() > std::string("unix:").size()) return absl::OkStatus();
    return absl::InvalidArgumentError("the address \"unix:\" has no path");
  }
  const size_t colon = address.rfind(':');
  int port = 0;
  const bool has_port = colon != std::string::npos && colon > 0 &&
                        absl::SimpleAtoi(address.substr(colon + 1), &port) && port > 0 &&
                        port < 65536;
  const std::string host = has_port ? address.substr(0, colon) : "";
  const bool bracketed = absl::StartsWith(host, "[") && absl::EndsWith(host, "]");
  if (has_port && (bracketed || host.find(':') == std::string::npos)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("the address \"", address, "\" is neither HOST:PORT nor unix:PATH"));
}

class Client::Impl {
 public:
  Impl(const std::string& address, const ClientOptions& options)
      : address_(address), options_(options) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(options.max_message_bytes);
    arguments.SetMaxSendMessageSize(options.max_message_bytes);
    // http_proxy in the environment is meant for the web, not for this.
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    channel_ = grpc::CreateCustomChannel(
        address, options.credentials ? options.credentials : grpc::InsecureChannelCredentials(),
        arguments);
    attention_ = v1::AttentionService::NewStub(channel_);
    admin_ = v1::AdminService::NewStub(channel_);
  }

  const std::string& address() const { return address_; }
  v1::AttentionService::Stub& attention() { return *attention_; }
  v1::AdminService::Stub& admin() { return *admin_; }

  template <typename Stub, typename Request, typename Response>
  absl::StatusOr<Response> Call(Stub& stub,
                                grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&,
                                                             Response*),
                                const Request& request) {
    const size_t bytes = request.ByteSizeLong();
    if (bytes > static_cast<size_t>(options_.max_message_bytes)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the request has ", bytes, " bytes; a message may have ", options_.max_message_bytes));
    }
    grpc::ClientContext context;
    SetDeadline(context);
    const Registration registration(*this, context);
    Response response;
    const grpc::Status status = (stub.*method)(&context, request, &response);
    if (!status.ok()) return ToAbslStatus(status, context, address_);
    return response;
  }

  int CancelCalls() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (grpc::ClientContext* context : running_) context->TryCancel();
    return static_cast<int>(running_.size());
  }

 private:
  // Keeps a call among those that CancelCalls reaches, for as long as its context lives.
  class Registration {
   public:
    Registration(Impl& impl, grpc::ClientContext& context) : impl_(impl), context_(context) {
      const std::lock_guard<std::mutex> lock(impl_.mutex_);
      impl_.running_.insert(&context_);
    }
    ~Registration() {
      const std::lock_guard<std::mutex> lock(impl_.mutex_);
      impl_.running_.erase(&context_);
    }

   private:
    Impl& impl_;
    grpc::ClientContext& context_;
  };

  void SetDeadline(grpc::ClientContext& context) const {
    // A year stands for all that is longer: the clock's own arithmetic overflows at 292.
    constexpr double kYear = 365.0 * 24 * 3600;
    if (options_.timeout_seconds <= 0) return;
    const std::chrono::duration<double> timeout(std::min(options_.timeout_seconds, kYear));
    context.set_deadline(std::chrono::system_clock::now() +
                         std::chrono::duration_cast<std::chrono::microseconds>(timeout));
  }

  const std::string address_;
  const ClientOptions options_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::AttentionService::Stub> attention_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
  std::mutex mutex_;
  std::set<grpc::ClientContext*> running_;
};

Client::Client(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Client::~Client() = default;

absl::StatusOr<std::unique_ptr<Client>> Client::Create(const std::string& address,
                                                       const ClientOptions& options) {
  if (absl::Status status = CheckAddress(address); !status.ok()) return status;
  return std::unique_ptr<Client>(new Client(std::make_unique<Impl>(address, options)));
}

const std::string& Client::address() const { return impl_->address(); }
int Client::CancelCalls() { return impl_->CancelCalls(); }

absl::StatusOr<v1::ForwardResponse> Client::Forward(const v1::ForwardRequest& request) {
  return impl_->Call(impl_->attention(), &v1::AttentionService::Stub::Forward, request);
}

absl::StatusOr<v1::AttendResponse> Client::Attend(const v1::AttendRequest& request) {
  return impl_->Call(impl_->attention(), &v1::AttentionService::Stub::Attend, request);
}

absl::StatusOr<v1::GetServerInfoResponse> Client::GetServerInfo() {
  return impl_->Call(impl_->attention(), &v1::AttentionService::Stub::GetServerInfo,
                     v1::GetServerInfoRequest());
}

absl::StatusOr<v1::ListModelsResponse> Client::ListModels() {
  return impl_->Call(impl_->admin(), &v1::AdminService::Stub::ListModels, v1::ListModelsRequest());
}

absl::StatusOr<v1::LoadModelResponse> Client::LoadModel(const v1::LoadModelRequest& request) {
  return impl_->Call(impl_->admin(), &v1::AdminService::Stub::LoadModel, request);
}

absl::StatusOr<v1::UnloadModelResponse> Client::UnloadModel(const v1::UnloadModelRequest& request) {
  return impl_->Call(impl_->admin(), &v1::AdminService::Stub::UnloadModel, request);
}

absl::StatusOr<v1::SwitchAttentionResponse> Client::SwitchAttention(
    const v1::SwitchAttentionRequest& request) {
  return impl_->Call(impl_->admin(), &v1::AdminService::Stub::SwitchAttention, request);
}

absl::StatusOr<v1::ListImplementationsResponse> Client::ListImplementations() {
  return impl_->Call(impl_->admin(), &v1::AdminService::Stub::ListImplementations,
                     v1::ListImplementationsRequest());
}

absl::StatusOr<v1::GetHardwareResponse> Client::GetHardware() {
  return impl_->Call(impl_->admin(), &v1::AdminService::Stub::GetHardware,
                     v1::GetHardwareRequest());
}

}  // namespace attn::client
