// Calls that name sessions, and ways to hold them up: what tests of sessions in the server share.
#pragma once

#include <atomic>
#include <cstdint>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "tests/server/server_fixture.h"

namespace attn::server {

// Dispatches; the future has the answer.
std::future<Reply> CallLater(
    Dispatcher& dispatcher, const Rpc& rpc, const google::protobuf::Message& request,
    std::shared_ptr<CallContext> context = std::make_shared<CallContext>());

// The new session's id.
std::string OpenSession(Dispatcher& dispatcher, const std::string& model = "");

// `tokens` random ones for each of the sessions: two heads of eight dimensions, causal, as many
// queries as tokens.
attention::v1::AttendRequest SessionAttend(const std::vector<std::string>& ids, unsigned seed,
                                           std::int64_t tokens = 1);
// The same without sessions: on what `earlier` calls brought, and its own.
attention::v1::AttendRequest WithoutSessions(
    const std::vector<attention::v1::AttendRequest>& earlier,
    const attention::v1::AttendRequest& request);

// Keeps the device busy, so that calls stay in its queue, until it is released or gone.
class DeviceBlock {
 public:
  explicit DeviceBlock(ServerState& state);
  ~DeviceBlock() { Release(); }
  void Release();

 private:
  std::promise<void> release_;
  bool released_ = false;
};

// A clock that tests set, read by the server's threads too.
class TestClock {
 public:
  SessionClock::time_point now() const {
    return SessionClock::time_point(std::chrono::nanoseconds(nanoseconds_.load()));
  }
  void Advance(double seconds) { nanoseconds_ += static_cast<std::int64_t>(seconds * 1e9); }

 private:
  std::atomic<std::int64_t> nanoseconds_{1};
};

bool AllClose(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace attn::server
