#include "client/cpp/session.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/cache_record.h"
#include "client/cpp/client_impl.h"

namespace attn::client {

namespace v1 = attention::v1;
using Stub = v1::AttentionService::Stub;

constexpr double kCloseSeconds = 1;  // that a destructor waits

struct Session::State {
  std::shared_ptr<Client::Impl> impl;
  RetryPolicy retry;
  std::string id, model, server_epoch;
  double time_to_live_seconds = 0;
  CacheRecord cache = {};
  bool closed = false;

  // The fields of a batch's rows, in the sessions' order.
  static absl::StatusOr<std::vector<CacheRecord::Row>> NextRows(absl::Span<Session* const> sessions,
                                                                const Layer& layer,
                                                                const CacheUse& use);

  // Forward or Attend with its steps, retries and what they leave in the records.
  template <typename Call, typename Request, typename Response>
  static absl::StatusOr<decltype(ToResult(Response()))> Run(
      absl::Span<Session* const> sessions, Call call,
      grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*));

  template <typename Response>
  static absl::Status Record(absl::Span<Session* const> sessions, const Layer& layer,
                             CacheMode mode, const std::vector<CacheRecord::Row>& rows,
                             const Outcome<Response>& outcome);
};

namespace {

absl::Status CheckRows(const char* field, const std::vector<int64_t>& values, size_t rows) {
  if (values.empty() || values.size() == rows) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has ", values.size(), " entries for ", rows, " sessions"));
}

v1::CacheMode ToProto(CacheMode mode) {
  switch (mode) {
    case CacheMode::kReadOnly:
      return v1::CACHE_MODE_READ_ONLY;
    case CacheMode::kDiscard:
      return v1::CACHE_MODE_DISCARD;
    case CacheMode::kAppend:
      break;
  }
  return v1::CACHE_MODE_APPEND;
}

v1::SessionBatch ToProto(const CacheUse& use, const std::vector<CacheRecord::Row>& rows) {
  v1::SessionBatch batch;
  batch.set_mode(ToProto(use.mode));
  batch.mutable_cache_position()->Assign(use.cache_position.begin(), use.cache_position.end());
  for (const CacheRecord::Row& row : rows) {
    batch.add_truncate(row.truncate);
    if (row.step != 0) batch.add_step(row.step);
  }
  const auto cuts = [](const CacheRecord::Row& row) { return row.truncate != -1; };
  if (std::none_of(rows.begin(), rows.end(), cuts)) batch.clear_truncate();
  return batch;
}

absl::Status Closed() { return absl::FailedPreconditionError("the session has been closed"); }

}  // namespace

absl::StatusOr<std::vector<CacheRecord::Row>> Session::State::NextRows(
    absl::Span<Session* const> sessions, const Layer& layer, const CacheUse& use) {
  if (sessions.empty()) return absl::InvalidArgumentError("a call needs a session");
  const State& first = *sessions[0]->state_;
  for (const absl::Status& status :
       {CheckRows("truncate", use.truncate, sessions.size()),
        CheckRows("cache_position", use.cache_position, sessions.size())}) {
    if (!status.ok()) return status;
  }
  std::vector<CacheRecord::Row> rows;
  for (size_t i = 0; i < sessions.size(); ++i) {
    State& state = *sessions[i]->state_;
    if (state.closed) return Closed();
    if (state.impl != first.impl || state.model != first.model) {
      return absl::InvalidArgumentError(
          absl::StrCat("session ", i, " is of another client or model than session 0"));
    }
    const int64_t truncate = use.truncate.empty() ? -1 : use.truncate[i];
    const auto row = state.cache.Next(layer, use.mode, truncate);
    if (!row.ok()) return row.status();
    rows.push_back(*row);
  }
  return rows;
}

template <typename Response>
absl::Status Session::State::Record(absl::Span<Session* const> sessions, const Layer& layer,
                                    CacheMode mode, const std::vector<CacheRecord::Row>& rows,
                                    const Outcome<Response>& outcome) {
  const bool ok = outcome.response.ok();
  const bool complete =
      ok && static_cast<size_t>(outcome.response->cache_length_size()) == sessions.size();
  for (size_t i = 0; i < sessions.size(); ++i) {
    CacheRecord& cache = sessions[i]->state_->cache;
    if (complete) {
      cache.Succeeded(layer, mode, outcome.response->cache_length(static_cast<int>(i)));
    } else if (ok || outcome.unanswered) {
      cache.Lost(layer, mode, rows[i]);
    }
  }
  if (complete) return absl::OkStatus();
  if (ok) return absl::InternalError("the server's answer lacks the sessions' cache_length");
  return outcome.response.status();
}

template <typename Call, typename Request, typename Response>
absl::StatusOr<decltype(ToResult(Response()))> Session::State::Run(
    absl::Span<Session* const> sessions, Call call,
    grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*)) {
  const absl::StatusOr<std::vector<CacheRecord::Row>> rows =
      NextRows(sessions, call.layer, call.cache);
  if (!rows.ok()) return rows.status();
  const Layer layer = call.layer;
  const CacheUse use = std::move(call.cache);
  const CallOptions options{call.timeout_seconds};

  const State& first = *sessions[0]->state_;
  Request request = ToRequest(first.model, std::move(call));
  v1::SessionBatch& batch = *request.mutable_past_key_value()->mutable_sessions();
  batch = ToProto(use, *rows);
  for (const Session* session : sessions) batch.add_session_ids(session->id());

  Outcome<Response> outcome = first.impl->CallWithRetries(first.impl->attention(), method, request,
                                                          {first.retry, Repeatable::kAll}, options);
  const absl::Status status = Record(sessions, layer, use.mode, *rows, outcome);
  if (!status.ok()) return status;
  auto result = ToResult(*std::move(outcome.response));
  result.attempts = outcome.attempts;
  return result;
}

Session::Session(std::unique_ptr<State> state) : state_(std::move(state)) {}
Session::Session(Session&&) noexcept = default;

Session& Session::operator=(Session&& other) noexcept {
  // Through a temporary, so that the session that was here is closed.
  Session moved(std::move(other));
  std::swap(state_, moved.state_);
  return *this;
}

Session::~Session() {
  if (state_ == nullptr || state_->closed) return;
  v1::CloseSessionRequest request;
  request.set_session_id(state_->id);
  state_->impl->Call(state_->impl->attention(), &Stub::CloseSession, request, {kCloseSeconds})
      .IgnoreError();
}

const std::string& Session::id() const { return state_->id; }
const std::string& Session::model() const { return state_->model; }
const std::string& Session::server_epoch() const { return state_->server_epoch; }
double Session::time_to_live_seconds() const { return state_->time_to_live_seconds; }
int64_t Session::length(const Layer& layer) const { return state_->cache.length(layer); }

absl::StatusOr<ForwardResult> Session::Forward(ForwardCall call) {
  return ForwardBatch({this}, std::move(call));
}

absl::StatusOr<AttendResult> Session::Attend(AttendCall call) {
  return AttendBatch({this}, std::move(call));
}

absl::StatusOr<ForwardResult> Session::ForwardBatch(absl::Span<Session* const> sessions,
                                                    ForwardCall call) {
  return State::Run(sessions, std::move(call), &Stub::Forward);
}

absl::StatusOr<AttendResult> Session::AttendBatch(absl::Span<Session* const> sessions,
                                                  AttendCall call) {
  return State::Run(sessions, std::move(call), &Stub::Attend);
}

absl::StatusOr<std::vector<Session>> Session::Fork(uint32_t count, std::optional<int64_t> length) {
  if (state_->closed) return Closed();
  v1::ForkSessionRequest request;
  request.set_session_id(state_->id);
  request.set_count(count);
  if (length) request.set_length(*length);
  const auto outcome =
      state_->impl->CallWithRetries(state_->impl->attention(), &Stub::ForkSession, request,
                                    {state_->retry, Repeatable::kRefusals}, {});
  if (!outcome.response.ok()) return outcome.response.status();
  std::vector<Session> forks;
  for (const std::string& id : outcome.response->session_ids()) {
    auto fork = std::make_unique<State>(*state_);
    fork->id = id;
    fork->cache = state_->cache.Fork(length);
    forks.push_back(Session(std::move(fork)));
  }
  if (forks.size() != std::max(count, 1u)) {
    return absl::InternalError(
        absl::StrCat("the server made ", forks.size(), " forks of ", std::max(count, 1u)));
  }
  return forks;
}

absl::StatusOr<v1::GetSessionResponse> Session::Get() {
  if (state_->closed) return Closed();
  v1::GetSessionRequest request;
  request.set_session_id(state_->id);
  return state_->impl
      ->CallWithRetries(state_->impl->attention(), &Stub::GetSession, request,
                        {state_->retry, Repeatable::kAll}, {})
      .response;
}

absl::Status Session::Close() {
  if (state_->closed) return Closed();
  state_->closed = true;
  v1::CloseSessionRequest request;
  request.set_session_id(state_->id);
  const auto outcome =
      state_->impl->CallWithRetries(state_->impl->attention(), &Stub::CloseSession, request,
                                    {state_->retry, Repeatable::kAll}, {});
  const absl::Status& status = outcome.response.status();
  // An attempt whose answer was lost has closed it.
  if (absl::IsNotFound(status) && outcome.unanswered) return absl::OkStatus();
  return status;
}

absl::StatusOr<Session> Client::OpenSession(const SessionOptions& options) {
  v1::OpenSessionRequest request;
  request.set_model(options.model);
  request.set_reserve_tokens(options.reserve_tokens);
  request.set_time_to_live_seconds(options.time_to_live_seconds);
  request.set_cache_dtype(options.cache_dtype);
  request.set_rollback_tokens(options.rollback_tokens);
  auto outcome = impl_->CallWithRetries(impl_->attention(), &Stub::OpenSession, request,
                                        {options.retry, Repeatable::kRefusals}, {});
  if (!outcome.response.ok()) return outcome.response.status();
  const v1::OpenSessionResponse& response = *outcome.response;
  auto state = std::make_unique<Session::State>();
  state->impl = impl_;
  state->retry = options.retry;
  state->id = response.session_id();
  state->model = options.model;
  state->server_epoch = response.server_epoch();
  state->time_to_live_seconds = response.time_to_live_seconds();
  return Session(std::move(state));
}

}  // namespace attn::client
