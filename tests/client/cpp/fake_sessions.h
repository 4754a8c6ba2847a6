// A server of sessions in this process that loses answers, hangs and refuses as a test says, and
// otherwise keeps the rules of SessionBatch: what a client does wrong shows in the tokens it holds.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "absl/synchronization/notification.h"
#include "attention/v1/attention.grpc.pb.h"

namespace attn::client {

// What becomes of one call of a session.
struct Fault {
  enum Kind {
    kNone,
    kLoseCall,       // not executed, and the connection is lost
    kLoseAnswer,     // executed, then the connection is lost
    kHangBefore,     // executed when `released`
    kHangAfter,      // executed, answered when `released`
    kRefuse,         // RESOURCE_EXHAUSTED, with the delay
    kFail,           // INVALID_ARGUMENT, as the server says it
    kForgetLengths,  // executed and answered, without cache_length
  };
  Kind kind = kNone;
  double retry_delay_seconds = 0;
};

class FakeSessions : public attention::v1::AttentionService::Service {
 public:
  // Hidden states of size 1: a token is its number. The output of a query is the sum of what it
  // sees.
  struct Cache {
    std::vector<float> tokens;
    size_t before_last = 0;  // tokens, before the last call's were appended
    uint64_t step = 0;
    bool may_retry = false;  // not of a parent's call
  };
  using CacheKey = std::tuple<std::string, uint32_t, bool>;
  using Caches = std::map<CacheKey, Cache>;

  grpc::Status Forward(grpc::ServerContext* context, const attention::v1::ForwardRequest* request,
                       attention::v1::ForwardResponse* response) override;
  grpc::Status Attend(grpc::ServerContext* context, const attention::v1::AttendRequest* request,
                      attention::v1::AttendResponse* response) override;
  grpc::Status OpenSession(grpc::ServerContext* context,
                           const attention::v1::OpenSessionRequest* request,
                           attention::v1::OpenSessionResponse* response) override;
  grpc::Status ForkSession(grpc::ServerContext* context,
                           const attention::v1::ForkSessionRequest* request,
                           attention::v1::ForkSessionResponse* response) override;
  grpc::Status GetSession(grpc::ServerContext* context,
                          const attention::v1::GetSessionRequest* request,
                          attention::v1::GetSessionResponse* response) override;
  grpc::Status CloseSession(grpc::ServerContext* context,
                            const attention::v1::CloseSessionRequest* request,
                            attention::v1::CloseSessionResponse* response) override;

  // Of the next calls, in order; those after them are well.
  void Expect(const std::vector<Fault>& faults);
  // What every hanging call waits for.
  void Release();
  // Until so many calls that hung before they were executed have been.
  void AwaitLate(int count);

  // Tokens of layer 0.
  std::vector<float> Tokens(const std::string& id);
  std::vector<std::string> Open();
  int calls(const std::string& rpc);
  int late_refused();

  // Requests as they came.
  std::vector<attention::v1::ForwardRequest> forwards;
  attention::v1::OpenSessionRequest opened;

 private:
  using Executor = std::function<grpc::Status(const Fault&)>;

  // Does what the next fault says around `execute`.
  grpc::Status Answer(grpc::ServerContext& context, const std::string& rpc,
                      const Executor& execute);
  grpc::Status Execute(const attention::v1::ForwardRequest& request,
                       attention::v1::ForwardResponse& response);

  std::mutex mutex_;
  std::deque<Fault> faults_;
  absl::Notification released_;
  std::condition_variable late_changed_;
  int late_ = 0, late_refused_ = 0, opened_count_ = 0;
  std::map<std::string, int> calls_;
  std::map<std::string, Caches> sessions_;
};

}  // namespace attn::client
