#include "server/session_lanes.h"

#include <algorithm>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn::server {

struct SessionLanes::Entry {
  std::vector<std::shared_ptr<Session>> sessions;
  std::shared_ptr<CallContext> call;
  Start start;
  Drop drop;
  std::size_t behind = 0;  // lanes in which it is not the first
  bool admitted = false;
  bool begun = false;  // or dropped
};

namespace {

// What became ready while this thread was already beginning calls: begun one after the other, not
// each inside the one before.
thread_local std::deque<std::function<void()>>* ready_calls = nullptr;

void RunInTurn(std::deque<std::function<void()>> calls) {
  if (ready_calls != nullptr) {
    for (std::function<void()>& call : calls) ready_calls->push_back(std::move(call));
    return;
  }
  ready_calls = &calls;
  const absl::Cleanup done = [] { ready_calls = nullptr; };
  while (!calls.empty()) {
    const std::function<void()> call = std::move(calls.front());
    calls.pop_front();
    call();
  }
}

}  // namespace

const std::vector<std::shared_ptr<Session>>& SessionLanes::Turn::sessions() const {
  return entry_->sessions;
}

void SessionLanes::Enter(std::vector<std::shared_ptr<Session>> sessions,
                         std::shared_ptr<CallContext> call, Start start, Drop drop) {
  std::size_t used = 0;
  while (used < sessions.size() && sessions[used]->BeginUse()) ++used;
  if (used < sessions.size()) {
    EndUse(sessions, used);
    return drop(SessionTable::NotFound());
  }
  auto entry = std::make_shared<Entry>(Entry{std::move(sessions), call, std::move(start), drop});
  // Before others can see the entry: who begins it may set a hook of its own.
  call->OnCancel([this, waiting = std::weak_ptr<Entry>(entry)] {
    if (const std::shared_ptr<Entry> cancelled = waiting.lock()) Cancel(cancelled);
  });
  bool first = false;
  if (!Admit(entry, first)) {
    EndUse(entry->sessions, used);
    absl::Status full =
        MakeError(absl::StatusCode::kResourceExhausted, "QUEUE_FULL",
                  absl::StrCat("the ", capacity_, " calls that may wait for sessions do already"));
    SetRetryDelay(full, 0.01);
    return drop(std::move(full));
  }
  if (first) return Begin(entry);
  if (call->cancelled()) Cancel(entry);  // it was before the entry was there
}

bool SessionLanes::Admit(const std::shared_ptr<Entry>& entry, bool& first) {
  std::lock_guard lock(mutex_);
  for (const auto& session : entry->sessions) {
    const auto lane = lanes_.find(session.get());
    entry->behind += lane == lanes_.end() ? 0 : 1;
  }
  first = entry->behind == 0;
  if (!first && waiting_ >= capacity_) return false;
  for (const auto& session : entry->sessions) lanes_[session.get()].push_back(entry);
  entry->admitted = true;
  entry->begun = first;
  waiting_ += first ? 0 : 1;
  return true;
}

void SessionLanes::Begin(const std::shared_ptr<Entry>& entry) {
  auto turn = std::make_shared<Turn>(*this, entry);
  const Start start = std::move(entry->start);
  const Drop drop = std::move(entry->drop);
  absl::Status status = entry->call->Wanted();
  for (const auto& session : entry->sessions) {
    if (status.ok() && session->closed()) status = SessionTable::NotFound();
  }
  if (status.ok()) return start(std::move(turn));
  turn.reset();
  drop(std::move(status));
}

void SessionLanes::Cancel(const std::shared_ptr<Entry>& entry) {
  {
    std::lock_guard lock(mutex_);
    if (!entry->admitted || entry->begun) return;
    entry->begun = true;
    --waiting_;
  }
  // The answer comes last: who waits for it may end everything else.
  const Drop drop = std::move(entry->drop);
  Leave(entry);
  drop(entry->call->Wanted());
}

std::vector<std::shared_ptr<SessionLanes::Entry>> SessionLanes::Remove(
    const std::shared_ptr<Entry>& entry) {
  std::vector<std::shared_ptr<Entry>> ready;
  std::lock_guard lock(mutex_);
  for (const auto& session : entry->sessions) {
    const auto lane = lanes_.find(session.get());
    std::deque<std::shared_ptr<Entry>>& entries = lane->second;
    const bool was_first = entries.front() == entry;
    entries.erase(std::find(entries.begin(), entries.end(), entry));
    if (entries.empty()) {
      lanes_.erase(lane);
      continue;
    }
    Entry& next = *entries.front();
    if (!was_first || --next.behind > 0 || next.begun) continue;
    next.begun = true;
    --waiting_;
    ready.push_back(entries.front());
  }
  return ready;
}

void SessionLanes::Leave(const std::shared_ptr<Entry>& entry) {
  const std::vector<std::shared_ptr<Entry>> ready = Remove(entry);
  EndUse(entry->sessions, entry->sessions.size());
  std::deque<std::function<void()>> calls;
  for (const auto& next : ready) calls.emplace_back([this, next] { Begin(next); });
  RunInTurn(std::move(calls));
}

void SessionLanes::EndUse(const std::vector<std::shared_ptr<Session>>& sessions,
                          std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) sessions[i]->EndUse(table_.now());
}

std::size_t SessionLanes::waiting() const {
  std::lock_guard lock(mutex_);
  return waiting_;
}

}  // namespace attn::server
