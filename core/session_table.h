// All sessions of the server, by id. Opens, forks, finds, expires and lists them; what calls do to
// them is core/cache_call.h.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "core/session.h"

namespace attn {

class SessionTable {
 public:
  struct Options {
    std::size_t max_sessions = 65536;
    double default_time_to_live_seconds = 3600.0;
    double max_time_to_live_seconds = 7.0 * 24 * 3600;
    std::function<SessionClock::time_point()> now = &SessionClock::now;
  };
  // Counted since the start, for metrics.
  struct Events {
    std::uint64_t opened = 0;
    std::uint64_t forked = 0;
    std::uint64_t closed = 0;
    std::uint64_t expired = 0;
  };

  // The table's sessions keep their blocks in `cache`.
  SessionTable(std::shared_ptr<CachePool> cache, Options options)
      : cache_(std::move(cache)), options_(std::move(options)) {}

  // `pool` is that of the session's model. INVALID_ARGUMENT for options out of range,
  // RESOURCE_EXHAUSTED for memory to set aside that is not there, or for too many sessions (reason
  // TOO_MANY_SESSIONS).
  absl::StatusOr<std::shared_ptr<Session>> Open(std::shared_ptr<ManagerPool> pool,
                                                const SessionOptions& options);

  // `count` of them, or none. As Session::Fork.
  absl::StatusOr<std::vector<std::shared_ptr<Session>>> Fork(const Session& parent,
                                                             std::optional<std::int64_t> length,
                                                             std::uint32_t count);

  // Touches it. NOT_FOUND (reason SESSION_NOT_FOUND), the same for ids that never were, are closed
  // or expired.
  absl::StatusOr<std::shared_ptr<Session>> Find(const std::string& id);

  // Of the session with this id, without touching it; nothing where there is none.
  std::optional<double> IdleSeconds(const std::string& id, SessionClock::time_point now) const;

  static absl::Status NotFound();

  // Whether it was there.
  bool Close(const Session& session);
  // Of the model whose pool this is; how many there were.
  std::size_t CloseAll(const ManagerPool& pool);
  // While a model is being unloaded no session of it is opened or forked. False, and nothing
  // changed, where `close` is not set and it has sessions: `open` of them.
  bool BeginUnload(const ManagerPool& pool, bool close, std::uint64_t& open);
  void EndUnload(const ManagerPool& pool);
  struct Usage {
    std::uint64_t sessions = 0;
    std::uint64_t bytes = 0;  // blocks that forks share once for each
  };
  std::map<std::string, Usage> UsageByModel() const;  // "": of sessions without one

  // Ends what has been idle for its time to live.
  void Expire();

  struct Listed {
    std::uint64_t serial;  // in the order of opening
    std::shared_ptr<Session> session;
  };
  // The first `limit` sessions behind `after` (0: from the start) of `model`, or of all where it is
  // not given.
  std::vector<Listed> List(const std::optional<std::string>& model, std::uint64_t after,
                           std::size_t limit) const;

  SessionClock::time_point now() const { return options_.now(); }
  const CachePool& cache() const { return *cache_; }
  Events events() const;
  std::size_t size() const;

 private:
  std::vector<std::shared_ptr<Session>> All() const;
  // `parent`, where there is one, must be in the table still.
  absl::Status Add(const std::vector<std::shared_ptr<Session>>& sessions, const Session* parent);
  // Those that `ends` holds for, out of the table; closed by the caller, outside the lock.
  std::vector<std::shared_ptr<Session>> Take(const std::function<bool(Session&)>& ends);

  const std::shared_ptr<CachePool> cache_;
  const Options options_;

  mutable std::mutex mutex_;
  std::unordered_map<std::string, std::uint64_t> serials_;  // by id
  std::map<std::uint64_t, std::shared_ptr<Session>> sessions_;
  std::set<const ManagerPool*> unloading_;
  std::uint64_t next_serial_ = 1;
  Events events_;
};

}  // namespace attn
