#include "client/cpp/attnd_client.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/cpp/client_impl.h"

namespace attn::client {

namespace v1 = attention::v1;
using AttentionStub = v1::AttentionService::Stub;
using AdminStub = v1::AdminService::Stub;

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

Client::Client(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Client::~Client() = default;

absl::StatusOr<std::unique_ptr<Client>> Client::Create(const std::string& address,
                                                       const ClientOptions& options) {
  if (absl::Status status = CheckAddress(address); !status.ok()) return status;
  return std::unique_ptr<Client>(new Client(std::make_shared<Impl>(address, options)));
}

const std::string& Client::address() const { return impl_->address(); }
int Client::CancelCalls() { return impl_->CancelCalls(); }

absl::StatusOr<v1::ForwardResponse> Client::Forward(const v1::ForwardRequest& request,
                                                    const CallOptions& options) {
  return impl_->Call(impl_->attention(), &AttentionStub::Forward, request, options);
}

absl::StatusOr<v1::AttendResponse> Client::Attend(const v1::AttendRequest& request,
                                                  const CallOptions& options) {
  return impl_->Call(impl_->attention(), &AttentionStub::Attend, request, options);
}

absl::StatusOr<v1::OpenSessionResponse> Client::OpenSession(const v1::OpenSessionRequest& request,
                                                            const CallOptions& options) {
  return impl_->Call(impl_->attention(), &AttentionStub::OpenSession, request, options);
}

absl::StatusOr<v1::ForkSessionResponse> Client::ForkSession(const v1::ForkSessionRequest& request,
                                                            const CallOptions& options) {
  return impl_->Call(impl_->attention(), &AttentionStub::ForkSession, request, options);
}

absl::StatusOr<v1::GetSessionResponse> Client::GetSession(const v1::GetSessionRequest& request,
                                                          const CallOptions& options) {
  return impl_->Call(impl_->attention(), &AttentionStub::GetSession, request, options);
}

absl::StatusOr<v1::CloseSessionResponse> Client::CloseSession(
    const v1::CloseSessionRequest& request, const CallOptions& options) {
  return impl_->Call(impl_->attention(), &AttentionStub::CloseSession, request, options);
}

absl::StatusOr<v1::GetServerInfoResponse> Client::GetServerInfo() {
  return impl_->Call(impl_->attention(), &AttentionStub::GetServerInfo, v1::GetServerInfoRequest());
}

absl::StatusOr<v1::ListModelsResponse> Client::ListModels() {
  return impl_->Call(impl_->admin(), &AdminStub::ListModels, v1::ListModelsRequest());
}

absl::StatusOr<v1::LoadModelResponse> Client::LoadModel(const v1::LoadModelRequest& request) {
  return impl_->Call(impl_->admin(), &AdminStub::LoadModel, request);
}

absl::StatusOr<v1::UnloadModelResponse> Client::UnloadModel(const v1::UnloadModelRequest& request) {
  return impl_->Call(impl_->admin(), &AdminStub::UnloadModel, request);
}

absl::StatusOr<v1::SelectAttentionResponse> Client::SelectAttention(
    const v1::SelectAttentionRequest& request) {
  return impl_->Call(impl_->admin(), &AdminStub::SelectAttention, request);
}

absl::StatusOr<v1::SwitchAttentionResponse> Client::SwitchAttention(
    const v1::SwitchAttentionRequest& request) {
  return impl_->Call(impl_->admin(), &AdminStub::SwitchAttention, request);
}

absl::Status Client::BenchmarkAttention(
    const v1::BenchmarkAttentionRequest& request,
    const std::function<void(const v1::BenchmarkAttentionResponse&)>& take,
    const CallOptions& options) {
  return impl_->ReadAll(impl_->admin(), &AdminStub::BenchmarkAttention, request, take, options);
}

absl::StatusOr<v1::ListImplementationsResponse> Client::ListImplementations() {
  return impl_->Call(impl_->admin(), &AdminStub::ListImplementations,
                     v1::ListImplementationsRequest());
}

absl::StatusOr<v1::GetHardwareResponse> Client::GetHardware() {
  return impl_->Call(impl_->admin(), &AdminStub::GetHardware, v1::GetHardwareRequest());
}

absl::StatusOr<v1::ListSessionsResponse> Client::ListSessions(
    const v1::ListSessionsRequest& request) {
  return impl_->Call(impl_->admin(), &AdminStub::ListSessions, request);
}

absl::StatusOr<v1::ListSessionsResponse> Client::ListAllSessions(const std::string& model) {
  v1::ListSessionsRequest request;
  request.set_model(model);
  v1::ListSessionsResponse all;
  for (;;) {
    const absl::StatusOr<v1::ListSessionsResponse> page = ListSessions(request);
    if (!page.ok()) return page.status();
    all.mutable_sessions()->MergeFrom(page->sessions());
    if (page->next_page_token().empty()) return all;
    // Or a server with a bug could hold its clients here for ever.
    if (page->next_page_token() == request.page_token()) {
      return absl::InternalError("the server's list of sessions does not advance");
    }
    request.set_page_token(page->next_page_token());
  }
}

}  // namespace attn::client
