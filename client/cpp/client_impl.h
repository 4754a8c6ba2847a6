// What Client and Session share and nobody else includes: the stubs, and how one call is made, with
// its deadline, its cancellation and its attempts.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "attention/v1/admin.grpc.pb.h"
#include "attention/v1/attention.grpc.pb.h"
#include "client/cpp/attnd_client.h"
#include "client/cpp/retry.h"

namespace attn::client {

absl::Status ToAbslStatus(const grpc::Status& status, const grpc::ClientContext& context,
                          const std::string& address);

// The same status, its server's Error included, with "(after 3 attempts)" behind its message.
absl::Status WithAttempts(const absl::Status& status, int attempts);

// How a call with retries ended.
template <typename Response>
struct Outcome {
  absl::StatusOr<Response> response;
  int attempts = 1;
  bool unanswered = false;  // some attempt got no answer from attnd: it may have been executed
};

struct RetryOptions {
  RetryPolicy policy;
  Repeatable repeatable = Repeatable::kNothing;
};

class Client::Impl {
 public:
  Impl(const std::string& address, const ClientOptions& options);

  const std::string& address() const { return address_; }
  attention::v1::AttentionService::Stub& attention() { return *attention_; }
  attention::v1::AdminService::Stub& admin() { return *admin_; }

  int CancelCalls();

  template <typename Stub, typename Request, typename Response>
  using Method = grpc::Status (Stub::*)(grpc::ClientContext*, const Request&, Response*);

  template <typename Stub, typename Request, typename Response>
  absl::StatusOr<Response> Call(Stub& stub, Method<Stub, Request, Response> method,
                                const Request& request, const CallOptions& options = {}) {
    if (absl::Status status = CheckSize(request); !status.ok()) return status;
    Operation operation(*this, options);
    return Attempt(operation, stub, method, request, operation.deadline());
  }

  template <typename Stub, typename Request, typename Response>
  Outcome<Response> CallWithRetries(Stub& stub, Method<Stub, Request, Response> method,
                                    const Request& request, const RetryOptions& retry,
                                    const CallOptions& options) {
    if (absl::Status status = CheckSize(request); !status.ok()) return {status};
    Outcome<Response> outcome{absl::UnknownError("not attempted")};
    Operation operation(*this, options);
    for (;; ++outcome.attempts) {
      outcome.response =
          Attempt(operation, stub, method, request, AttemptDeadline(retry.policy, operation));
      if (outcome.response.ok()) return outcome;
      const absl::Status& status = outcome.response.status();
      if (!ErrorOf(status).answered) outcome.unanswered = true;
      if (!operation.WaitToRetry(retry, status, outcome.attempts)) {
        outcome.response = operation.Cancelled() ? absl::CancelledError("the call was cancelled")
                                                 : WithAttempts(status, outcome.attempts);
        return outcome;
      }
    }
  }

  template <typename Stub, typename Request, typename Response>
  using StreamMethod = std::unique_ptr<grpc::ClientReader<Response>> (Stub::*)(grpc::ClientContext*,
                                                                               const Request&);

  // One attempt of a call with a stream of answers, each of them given to `take`.
  template <typename Stub, typename Request, typename Response>
  absl::Status ReadAll(Stub& stub, StreamMethod<Stub, Request, Response> method,
                       const Request& request, const std::function<void(const Response&)>& take,
                       const CallOptions& options) {
    if (absl::Status status = CheckSize(request); !status.ok()) return status;
    Operation operation(*this, options);
    grpc::ClientContext context;
    SetDeadline(context, operation.deadline());
    const Registration registration(operation, context);
    const std::unique_ptr<grpc::ClientReader<Response>> reader = (stub.*method)(&context, request);
    Response response;
    while (reader->Read(&response)) take(response);
    const grpc::Status status = reader->Finish();
    return status.ok() ? absl::OkStatus() : ToAbslStatus(status, context, address_);
  }

  // OK where a request is not larger than a message may be.
  absl::Status CheckSize(const google::protobuf::Message& request) const;

 private:
  // One call of the library's user, from its first attempt to its last: what CancelCalls reaches.
  class Operation {
   public:
    Operation(Impl& impl, const CallOptions& options);
    ~Operation();

    absl::Time deadline() const { return deadline_; }

    // False where `status` is the call's: not worth a retry, no time left for one, or cancelled.
    bool WaitToRetry(const RetryOptions& retry, const absl::Status& status, int attempt);

    bool Cancelled() const;

   private:
    friend class Impl;

    Impl& impl_;
    absl::Time deadline_;
    grpc::ClientContext* context_ = nullptr;  // of the attempt in progress; guarded, as the next
    bool cancelled_ = false;
  };

  // For as long as its context lives, CancelCalls may cancel it.
  class Registration {
   public:
    Registration(Operation& operation, grpc::ClientContext& context);
    ~Registration();

   private:
    Operation& operation_;
  };

  template <typename Stub, typename Request, typename Response>
  absl::StatusOr<Response> Attempt(Operation& operation, Stub& stub,
                                   Method<Stub, Request, Response> method, const Request& request,
                                   absl::Time deadline) {
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    const Registration registration(operation, context);
    Response response;
    const grpc::Status status = (stub.*method)(&context, request, &response);
    if (!status.ok()) return ToAbslStatus(status, context, address_);
    return response;
  }

  static absl::Time AttemptDeadline(const RetryPolicy& policy, const Operation& operation);
  static void SetDeadline(grpc::ClientContext& context, absl::Time deadline);

  const std::string address_;
  const ClientOptions options_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<attention::v1::AttentionService::Stub> attention_;
  std::unique_ptr<attention::v1::AdminService::Stub> admin_;
  std::mutex mutex_;
  std::condition_variable cancelled_;
  std::set<Operation*> running_;
};

}  // namespace attn::client
