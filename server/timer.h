// Functions at given times, on a thread of its own: deadlines of requests that share a stream, the
// expiry of sessions.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "server/call_context.h"

namespace attn::server {

class Timer {
 public:
  using Id = std::pair<Clock::time_point, std::uint64_t>;

  Timer() : thread_([this] { Loop(); }) {}
  ~Timer() { Stop(); }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  // Returns when nothing runs any more; what has not come due, or is set afterwards, never does.
  void Stop();

  // `run` is short, and may use the timer.
  Id At(Clock::time_point time, std::function<void()> run);
  // Unless it runs or ran.
  void Cancel(const Id& id);

 private:
  void Loop();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<Id, std::function<void()>> due_;
  std::uint64_t next_ = 0;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace attn::server
