#include "core/session_table.h"

#include <algorithm>
#include <random>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

constexpr std::uint32_t kMaxForks = 1024;  // of one call

// 128 bits of the operating system's randomness.
std::string MakeId() {
  std::random_device random;
  std::string bytes;
  for (int word = 0; word < 4; ++word) {
    const std::uint32_t bits = random();
    for (int i = 0; i < 4; ++i) bytes.push_back(static_cast<char>(bits >> 8 * i & 0xff));
  }
  return absl::BytesToHexString(bytes);
}

}  // namespace

absl::Status SessionTable::NotFound() {
  return MakeError(absl::StatusCode::kNotFound, "SESSION_NOT_FOUND",
                   "there is no such session: it never was, was closed, or expired");
}

std::optional<double> SessionTable::IdleSeconds(const std::string& id,
                                                SessionClock::time_point now) const {
  std::lock_guard lock(mutex_);
  const auto serial = serials_.find(id);
  if (serial == serials_.end()) return std::nullopt;
  return sessions_.at(serial->second)->idle_seconds(now);
}

absl::Status SessionTable::Add(const std::vector<std::shared_ptr<Session>>& sessions,
                               const Session* parent) {
  std::lock_guard lock(mutex_);
  // Its model may have been unloaded, with its sessions, while the forks were made.
  if (parent != nullptr && serials_.count(parent->id()) == 0) return NotFound();
  for (const std::shared_ptr<Session>& session : sessions) {
    if (unloading_.count(session->pool().get()) == 0) continue;
    return MakeError(absl::StatusCode::kNotFound, "MODEL_NOT_FOUND", "the model is being unloaded");
  }
  if (sessions_.size() + sessions.size() > options_.max_sessions) {
    return MakeError(absl::StatusCode::kResourceExhausted, "TOO_MANY_SESSIONS",
                     absl::StrCat("there are ", sessions_.size(), " sessions of the ",
                                  options_.max_sessions, " that the server holds"));
  }
  for (const std::shared_ptr<Session>& session : sessions) {
    serials_.emplace(session->id(), next_serial_);
    sessions_.emplace(next_serial_, session);
    ++next_serial_;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<Session>> SessionTable::Open(std::shared_ptr<ManagerPool> pool,
                                                            const SessionOptions& options) {
  SessionOptions complete = options;
  const double given = options.time_to_live_seconds;
  if (!(given >= 0.0) || given > options_.max_time_to_live_seconds) {
    return InvalidField("time_to_live_seconds",
                        absl::StrCat("time_to_live_seconds is ", given,
                                     ", but must be between 0 (the default) and ",
                                     options_.max_time_to_live_seconds));
  }
  if (given == 0.0) complete.time_to_live_seconds = options_.default_time_to_live_seconds;
  ATTN_ASSIGN_OR_RETURN(std::shared_ptr<Session> session,
                        Session::Create(MakeId(), std::move(pool), cache_, complete, now()));
  ATTN_RETURN_IF_ERROR(Add({session}, nullptr));
  std::lock_guard lock(mutex_);
  ++events_.opened;
  return session;
}

absl::StatusOr<std::vector<std::shared_ptr<Session>>> SessionTable::Fork(
    const Session& parent, std::optional<std::int64_t> length, std::uint32_t count) {
  if (length && *length < 0) {
    return InvalidField("length",
                        absl::StrCat("length is ", *length, ", but must not be negative"));
  }
  if (count > kMaxForks) {
    return InvalidField("count", absl::StrCat("count is ", count, ", more than ", kMaxForks));
  }
  std::vector<std::shared_ptr<Session>> forks;
  for (std::uint32_t i = 0; i < std::max(count, 1u); ++i) {
    ATTN_ASSIGN_OR_RETURN(std::shared_ptr<Session> fork, parent.Fork(MakeId(), length, now()));
    forks.push_back(std::move(fork));
  }
  ATTN_RETURN_IF_ERROR(Add(forks, &parent));
  std::lock_guard lock(mutex_);
  events_.forked += forks.size();
  return forks;
}

absl::StatusOr<std::shared_ptr<Session>> SessionTable::Find(const std::string& id) {
  std::shared_ptr<Session> session;
  {
    std::lock_guard lock(mutex_);
    const auto serial = serials_.find(id);
    if (serial == serials_.end()) return NotFound();
    session = sessions_.at(serial->second);
  }
  if (session->Expired(now())) {
    Expire();
    return NotFound();
  }
  session->Touch(now());
  return session;
}

bool SessionTable::Close(const Session& session) {
  std::shared_ptr<Session> closed;
  {
    std::lock_guard lock(mutex_);
    const auto serial = serials_.find(session.id());
    if (serial == serials_.end()) return false;
    const auto entry = sessions_.find(serial->second);
    closed = std::move(entry->second);
    sessions_.erase(entry);
    serials_.erase(serial);
    ++events_.closed;
  }
  closed->Close();
  return true;
}

std::size_t SessionTable::CloseAll(const ManagerPool& pool) {
  const std::vector<std::shared_ptr<Session>> taken =
      Take([&](Session& session) { return session.pool().get() == &pool; });
  for (const std::shared_ptr<Session>& closed : taken) closed->Close();
  std::lock_guard lock(mutex_);
  events_.closed += taken.size();
  return taken.size();
}

std::vector<std::shared_ptr<Session>> SessionTable::All() const {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<Session>> all;
  for (const auto& [serial, session] : sessions_) all.push_back(session);
  return all;
}

bool SessionTable::BeginUnload(const ManagerPool& pool, bool close, std::uint64_t& open) {
  std::lock_guard lock(mutex_);
  open = 0;
  for (const auto& [serial, session] : sessions_) open += session->pool().get() == &pool ? 1 : 0;
  if (open > 0 && !close) return false;
  unloading_.insert(&pool);
  return true;
}

void SessionTable::EndUnload(const ManagerPool& pool) {
  std::lock_guard lock(mutex_);
  unloading_.erase(&pool);
}

std::map<std::string, SessionTable::Usage> SessionTable::UsageByModel() const {
  std::map<std::string, Usage> usages;
  for (const std::shared_ptr<Session>& session : All()) {
    Usage& usage = usages[session->model()];
    ++usage.sessions;
    usage.bytes += session->bytes();
  }
  return usages;
}

void SessionTable::Expire() {
  const SessionClock::time_point now = options_.now();
  const std::vector<std::shared_ptr<Session>> taken =
      Take([&](Session& session) { return session.EndIfExpired(now); });
  for (const std::shared_ptr<Session>& expired : taken) expired->Close();
  std::lock_guard lock(mutex_);
  events_.expired += taken.size();
}

std::vector<std::shared_ptr<Session>> SessionTable::Take(
    const std::function<bool(Session&)>& ends) {
  std::vector<std::shared_ptr<Session>> taken;
  std::lock_guard lock(mutex_);
  for (auto entry = sessions_.begin(); entry != sessions_.end();) {
    if (!ends(*entry->second)) {
      ++entry;
      continue;
    }
    serials_.erase(entry->second->id());
    taken.push_back(std::move(entry->second));
    entry = sessions_.erase(entry);
  }
  return taken;
}

std::vector<SessionTable::Listed> SessionTable::List(const std::optional<std::string>& model,
                                                     std::uint64_t after, std::size_t limit) const {
  std::vector<Listed> listed;
  std::lock_guard lock(mutex_);
  for (auto entry = sessions_.upper_bound(after); entry != sessions_.end() && listed.size() < limit;
       ++entry) {
    if (model && entry->second->model() != *model) continue;
    listed.push_back({entry->first, entry->second});
  }
  return listed;
}

SessionTable::Events SessionTable::events() const {
  std::lock_guard lock(mutex_);
  return events_;
}

std::size_t SessionTable::size() const {
  std::lock_guard lock(mutex_);
  return sessions_.size();
}

}  // namespace attn
