#include "server/session_handlers.h"

#include <charconv>
#include <unordered_set>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "server/spec_codec.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

constexpr std::uint32_t kDefaultPage = 100;
constexpr std::uint32_t kMaxPage = 1000;
constexpr std::size_t kPrefixCharacters = 8;
constexpr std::uint64_t kMaxSessionsOfCall = 65536;

absl::Status WithRow(const absl::Status& status, std::size_t row) {
  return MakeError(status.code(), ErrorReason(status),
                   absl::StrCat(std::string(status.message()), " (row ", row, ")"),
                   {{"row", absl::StrCat(row)}});
}

// A page token is the serial of the last session of the page before.
absl::StatusOr<std::uint64_t> ReadPageToken(const std::string& token) {
  std::uint64_t serial = 0;
  const char* const end = token.data() + token.size();
  const auto [stop, error] = std::from_chars(token.data(), end, serial);
  if (!token.empty() && (error != std::errc() || stop != end)) {
    return InvalidField("page_token", "page_token is not one that this server gave");
  }
  return serial;
}

}  // namespace

absl::Status HandleOpenSession(ServerState& state, const proto::OpenSessionRequest& request,
                               proto::OpenSessionResponse& response) {
  ATTN_ASSIGN_OR_RETURN(const std::shared_ptr<ManagerPool> pool,
                        state.registry().Find(request.model()));
  SessionOptions options;
  options.reserve_tokens = request.reserve_tokens();
  options.time_to_live_seconds = request.time_to_live_seconds();
  options.rollback_tokens = request.rollback_tokens();
  options.cache_dtype = FromProto(request.cache_dtype());
  if (request.cache_dtype() != proto::DATA_TYPE_UNSPECIFIED &&
      options.cache_dtype == DType::kUnspecified) {
    return InvalidField("cache_dtype",
                        absl::StrCat("cache_dtype is ", static_cast<int>(request.cache_dtype()),
                                     ", which is no dtype"));
  }
  ATTN_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session,
                        state.sessions().Open(pool, options));
  // The model may have been unloaded meanwhile, and its sessions closed, without this one.
  const auto still = state.registry().Find(request.model());
  if (!still.ok() || *still != pool) {
    state.sessions().Close(*session);
    return still.ok() ? MakeError(absl::StatusCode::kNotFound, "MODEL_NOT_FOUND",
                                  "the model was unloaded meanwhile")
                      : still.status();
  }
  response.set_session_id(session->id());
  response.set_time_to_live_seconds(session->time_to_live_seconds());
  response.set_server_epoch(state.epoch());
  return absl::OkStatus();
}

absl::Status HandleGetSession(ServerState& state, const proto::GetSessionRequest& request,
                              proto::GetSessionResponse& response) {
  // Before this rpc touches it.
  const SessionClock::time_point now = state.sessions().now();
  const std::optional<double> idle = state.sessions().IdleSeconds(request.session_id(), now);
  ATTN_ASSIGN_OR_RETURN(const std::shared_ptr<Session> session,
                        state.sessions().Find(request.session_id()));
  response.set_model(session->model());
  for (const Session::LayerState& layer : session->Layers()) {
    proto::LayerCache& message = *response.add_layers();
    message.set_stack(layer.key.stack);
    message.set_layer(layer.key.layer);
    message.set_kind(layer.key.kind == AttentionKind::kCross ? proto::ATTENTION_KIND_CROSS
                                                             : proto::ATTENTION_KIND_SELF);
    message.set_length(layer.length);
    message.set_first_position(layer.first_token);
    message.set_last_step(layer.last_step);
  }
  response.set_bytes(session->bytes());
  response.set_idle_seconds(idle.value_or(0.0));
  response.set_time_to_live_seconds(session->time_to_live_seconds());
  return absl::OkStatus();
}

absl::Status HandleListSessions(ServerState& state, const proto::ListSessionsRequest& request,
                                proto::ListSessionsResponse& response) {
  ATTN_ASSIGN_OR_RETURN(const std::uint64_t after, ReadPageToken(request.page_token()));
  std::optional<std::string> model;
  if (!request.model().empty()) {
    ATTN_RETURN_IF_ERROR(state.registry().Find(request.model()).status());
    model = request.model();
  }
  const std::size_t size =
      request.page_size() == 0 ? kDefaultPage : std::min(request.page_size(), kMaxPage);
  const SessionClock::time_point now = state.sessions().now();
  const std::vector<SessionTable::Listed> listed = state.sessions().List(model, after, size + 1);
  for (std::size_t i = 0; i < std::min(listed.size(), size); ++i) {
    const Session& session = *listed[i].session;
    proto::SessionStatus& message = *response.add_sessions();
    message.set_id_prefix(session.id().substr(0, kPrefixCharacters));
    message.set_model(session.model());
    message.set_length(session.longest_layer());
    message.set_bytes(session.bytes());
    message.set_idle_seconds(session.idle_seconds(now));
    message.set_age_seconds(session.age_seconds(now));
  }
  if (listed.size() > size) response.set_next_page_token(absl::StrCat(listed[size - 1].serial));
  return absl::OkStatus();
}

void HandleForkSession(ServerState& state, const proto::ForkSessionRequest& request,
                       std::shared_ptr<CallContext> context,
                       ResponseDone<proto::ForkSessionResponse> done) {
  const auto parent = state.sessions().Find(request.session_id());
  if (!parent.ok()) return done(parent.status());
  context->facts.model = (*parent)->model();
  std::optional<std::int64_t> length;
  if (request.has_length()) length = request.length();
  state.lanes().Enter(
      {*parent}, std::move(context),
      [&state, done, length, count = request.count()](std::shared_ptr<SessionLanes::Turn> turn) {
        auto response = GuardMemory([&]() -> absl::StatusOr<proto::ForkSessionResponse> {
          ATTN_ASSIGN_OR_RETURN(const auto forks,
                                state.sessions().Fork(*turn->sessions().front(), length, count));
          proto::ForkSessionResponse made;
          for (const std::shared_ptr<Session>& fork : forks) made.add_session_ids(fork->id());
          return made;
        });
        turn.reset();
        done(std::move(response));
      },
      [done](absl::Status status) { done(std::move(status)); });
}

void HandleCloseSession(ServerState& state, const proto::CloseSessionRequest& request,
                        std::shared_ptr<CallContext> context,
                        ResponseDone<proto::CloseSessionResponse> done) {
  const auto session = state.sessions().Find(request.session_id());
  if (!session.ok()) return done(session.status());
  context->facts.model = (*session)->model();
  state.lanes().Enter(
      {*session}, std::move(context),
      [&state, done](std::shared_ptr<SessionLanes::Turn> turn) {
        state.sessions().Close(*turn->sessions().front());
        turn.reset();
        done(proto::CloseSessionResponse());
      },
      [done](absl::Status status) { done(std::move(status)); });
}

absl::StatusOr<std::vector<std::shared_ptr<Session>>> FindSessions(
    ServerState& state, const std::vector<std::string>& ids, const ManagerPool& pool) {
  constexpr char kField[] = "past_key_value.sessions.session_ids";
  if (ids.size() > kMaxSessionsOfCall) {
    return InvalidField(kField, absl::StrCat(kField, " has ", ids.size(), " entries, more than ",
                                             kMaxSessionsOfCall));
  }
  std::vector<std::shared_ptr<Session>> sessions;
  std::unordered_set<const Session*> seen;
  for (std::size_t row = 0; row < ids.size(); ++row) {
    absl::StatusOr<std::shared_ptr<Session>> session = state.sessions().Find(ids[row]);
    // A session of another model looks the same as none.
    if (session.ok() && (*session)->pool().get() != &pool) session = SessionTable::NotFound();
    if (!session.ok()) return WithRow(session.status(), row);
    if (!seen.insert(session->get()).second) {
      return InvalidField(kField,
                          absl::StrCat(kField, " names the session of row ", row, " twice"));
    }
    sessions.push_back(*std::move(session));
  }
  return sessions;
}

}  // namespace attn::server
