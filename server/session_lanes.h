// The order of what names a session: one after the other, in the order of arrival, whatever carried
// it here. A call over several sessions has its turn when it is the first in each of their lanes;
// it enters all of them at once, so that no two calls wait for each other.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "core/session_table.h"
#include "server/call_context.h"

namespace attn::server {

class SessionLanes {
 public:
  // `capacity`: calls that may wait. The table outlives the lanes.
  SessionLanes(const SessionTable& table, std::size_t capacity)
      : table_(table), capacity_(capacity) {}

  struct Entry;
  // A call's turn: its sessions are its own, and can't expire, while this lives. Its end lets the
  // next ones in, on the thread where it ends.
  class Turn {
   public:
    Turn(SessionLanes& lanes, std::shared_ptr<Entry> entry)
        : lanes_(lanes), entry_(std::move(entry)) {}
    ~Turn() { lanes_.Leave(entry_); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    const std::vector<std::shared_ptr<Session>>& sessions() const;

   private:
    SessionLanes& lanes_;
    const std::shared_ptr<Entry> entry_;
  };
  using Start = std::function<void(std::shared_ptr<Turn>)>;
  using Drop = std::function<void(absl::Status)>;

  // Exactly one of `start` and `drop` is called, now or later: `drop` where a session is or gets
  // closed, where the call is no longer wanted when its turn comes or is cancelled before, and
  // where too many wait (RESOURCE_EXHAUSTED, reason QUEUE_FULL).
  void Enter(std::vector<std::shared_ptr<Session>> sessions, std::shared_ptr<CallContext> call,
             Start start, Drop drop);

  std::size_t waiting() const;

 private:
  bool Admit(const std::shared_ptr<Entry>& entry, bool& first);
  void Begin(const std::shared_ptr<Entry>& entry);
  void Cancel(const std::shared_ptr<Entry>& entry);
  void Leave(const std::shared_ptr<Entry>& entry);
  // Of the first `count` sessions.
  void EndUse(const std::vector<std::shared_ptr<Session>>& sessions, std::size_t count);
  // Out of its lanes; what is first now everywhere.
  std::vector<std::shared_ptr<Entry>> Remove(const std::shared_ptr<Entry>& entry);

  const SessionTable& table_;
  const std::size_t capacity_;
  mutable std::mutex mutex_;
  std::unordered_map<const Session*, std::deque<std::shared_ptr<Entry>>> lanes_;
  std::size_t waiting_ = 0;
};

}  // namespace attn::server
