// One stream of requests, without gRPC: envelopes in, answers out, each request through the
// dispatcher as if it were a call of its own. Bounded: what exceeds the limits is answered
// RESOURCE_EXHAUSTED.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "server/dispatcher.h"
#include "server/stream_codec.h"

namespace attn::server {

// An answer on its way. What it was made of is held until it is sent.
struct StreamAnswer {
  Answer answer;
  std::shared_ptr<void> held;
  // The request's share of the stream's limits, to be let go before the answer is given to gRPC:
  // the caller may have it, and send the next request, before we are told that it was sent.
  std::shared_ptr<void> share;
};

class RequestStream : public std::enable_shared_from_this<RequestStream> {
 public:
  // `write` takes answers in the order in which they are to leave, from any thread. The stream's
  // own deadline bounds those of its requests.
  RequestStream(ServerState& state, Dispatcher& dispatcher, Clock::time_point deadline,
                std::function<void(StreamAnswer)> write)
      : state_(state),
        dispatcher_(dispatcher),
        deadline_(deadline),
        write_(std::move(write)),
        answers_(std::make_shared<MemoryBudget>(state.limits().max_stream_bytes, "STREAM_LIMIT")) {}

  // One message; they are taken one after the other, in order. Its bytes are not needed afterwards.
  // Whether it has an answer, which `write` may have got already.
  bool OnMessage(const RequestBytes& bytes);

  // The caller is gone: every request is cancelled, and so is what still comes.
  void Cancel();

 private:
  struct Held;
  struct Pending {
    std::shared_ptr<CallContext> context;
    Timer::Id timer;
    bool timed = false;
  };

  absl::Status Admit(const StreamEnvelope& envelope, const std::shared_ptr<CallContext>& context,
                     std::shared_ptr<Held>& held);
  void OnAnswer(std::uint64_t id, StreamRequestKind kind, const absl::Status& status, Answer answer,
                std::shared_ptr<Held> held);
  void CancelRequest(std::uint64_t id);

  ServerState& state_;
  Dispatcher& dispatcher_;
  const Clock::time_point deadline_;
  const std::function<void(StreamAnswer)> write_;

  const std::shared_ptr<MemoryBudget> answers_;  // that have not been sent

  mutable std::mutex mutex_;
  std::unordered_map<std::uint64_t, Pending> pending_;
  std::size_t held_requests_ = 0;  // not sent yet
  std::uint64_t held_bytes_ = 0;
  bool cancelled_ = false;
};

}  // namespace attn::server
