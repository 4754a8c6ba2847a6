#include "server/health_service.h"

#include <grpcpp/support/server_callback.h>

#include "attention/v1/admin.grpc.pb.h"
#include "attention/v1/attention.grpc.pb.h"

namespace attn::server {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

bool IsKnown(const std::string& service) {
  return service.empty() || service == attention::v1::AttentionService::service_full_name() ||
         service == attention::v1::AdminService::service_full_name();
}

}  // namespace

// One Watch. Everything but the constructor and OnDone runs under the service's mutex: a write is
// in flight or it is not, and the stream is finished once.
class HealthService::Watcher final : public grpc::ServerWriteReactor<HealthCheckResponse> {
 public:
  Watcher(HealthService& service, bool known) : service_(service), known_(known) {
    std::lock_guard lock(service_.mutex_);
    service_.watchers_.insert(this);
    Update();
  }

  // Sends the status if it has changed, and then ends the stream if the service is closed.
  void Update() {
    if (writing_ || finished_) return;
    const HealthCheckResponse::ServingStatus status = service_.StatusOf(known_);
    if (status != sent_ || !sent_any_) {
      sent_ = status;
      sent_any_ = writing_ = true;
      message_.set_status(status);
      StartWrite(&message_);
    } else if (service_.closed_) {
      finished_ = true;
      Finish(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the server is shutting down"));
    }
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard lock(service_.mutex_);
    writing_ = false;
    if (ok && !cancelled_) return Update();
    FinishCancelled();
  }

  void OnCancel() override {
    std::lock_guard lock(service_.mutex_);
    cancelled_ = true;
    if (!writing_) FinishCancelled();  // otherwise OnWriteDone does
  }

  void OnDone() override {
    {
      std::lock_guard lock(service_.mutex_);
      service_.watchers_.erase(this);
    }
    delete this;
  }

 private:
  void FinishCancelled() {
    if (finished_) return;
    finished_ = true;
    Finish(grpc::Status(grpc::StatusCode::CANCELLED, "the caller is gone"));
  }

  HealthService& service_;
  const bool known_;
  HealthCheckResponse message_;
  HealthCheckResponse::ServingStatus sent_ = HealthCheckResponse::UNKNOWN;
  bool sent_any_ = false;
  bool writing_ = false;
  bool cancelled_ = false;
  bool finished_ = false;
};

HealthCheckResponse::ServingStatus HealthService::StatusOf(bool known) const {
  if (!known) return HealthCheckResponse::SERVICE_UNKNOWN;
  return serving_ ? HealthCheckResponse::SERVING : HealthCheckResponse::NOT_SERVING;
}

void HealthService::SetServing(bool serving) {
  std::lock_guard lock(mutex_);
  serving_ = serving;
  for (Watcher* watcher : watchers_) watcher->Update();
}

void HealthService::Close() {
  std::lock_guard lock(mutex_);
  closed_ = true;
  for (Watcher* watcher : watchers_) watcher->Update();
}

grpc::ServerUnaryReactor* HealthService::Check(grpc::CallbackServerContext* context,
                                               const HealthCheckRequest* request,
                                               HealthCheckResponse* response) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  if (!IsKnown(request->service())) {
    reactor->Finish(grpc::Status(grpc::StatusCode::NOT_FOUND, "no such service"));
    return reactor;
  }
  {
    std::lock_guard lock(mutex_);
    response->set_status(StatusOf(true));
  }
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerWriteReactor<HealthCheckResponse>* HealthService::Watch(
    grpc::CallbackServerContext*, const HealthCheckRequest* request) {
  return new Watcher(*this, IsKnown(request->service()));
}

}  // namespace attn::server
