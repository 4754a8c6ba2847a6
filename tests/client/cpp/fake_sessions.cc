#include "tests/client/cpp/fake_sessions.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"

namespace attn::client {
namespace {

namespace v1 = attention::v1;
using Code = grpc::StatusCode;

// How long a call hangs that nobody releases: the test fails then, and ends.
constexpr absl::Duration kTooLong = absl::Seconds(20);

grpc::Status Refuse(grpc::ServerContext& context, Code code, const std::string& message,
                    double delay = 0) {
  v1::Error error;
  error.set_code(code);
  error.set_reason("TEST");
  error.set_retry_delay_seconds(delay);
  context.AddTrailingMetadata("attention-error-bin", error.SerializeAsString());
  return grpc::Status(code, message);
}

// The rules of `step`, truncate and cache_position for one row; its new tokens are `added`.
grpc::Status Apply(const v1::SessionBatch& batch, int row, const std::vector<float>& added,
                   FakeSessions::Cache& cache) {
  const bool append = batch.mode() == v1::CACHE_MODE_APPEND;
  const uint64_t step = batch.step_size() > 0 ? batch.step(row) : 0;
  if (step != 0 && !append) return {Code::INVALID_ARGUMENT, "step of a call that changes nothing"};
  if (step != 0 && step == cache.step && cache.may_retry) {
    cache.tokens.resize(cache.before_last);
  } else if (step != 0 && step <= cache.step) {
    return {Code::ABORTED, absl::StrCat("step ", step, " after ", cache.step)};
  }
  const int64_t cut = batch.truncate_size() > 0 ? batch.truncate(row) : -1;
  if (cut > static_cast<int64_t>(cache.tokens.size())) return {Code::OUT_OF_RANGE, "truncate"};
  if (cut >= 0) cache.tokens.resize(static_cast<size_t>(cut));
  const int64_t position = batch.cache_position_size() > 0 ? batch.cache_position(row) : -1;
  if (position >= 0 && position != static_cast<int64_t>(cache.tokens.size())) {
    return {Code::ABORTED, "cache_position"};
  }
  cache.before_last = cache.tokens.size();
  cache.tokens.insert(cache.tokens.end(), added.begin(), added.end());
  cache.step = step;
  cache.may_retry = true;
  return grpc::Status::OK;
}

std::vector<float> Row(const v1::Tensor& tensor, int row) {
  const auto count = tensor.shape_size() > 1 ? static_cast<size_t>(tensor.shape(1)) : 0;
  std::vector<float> values(count);
  const size_t bytes = count * sizeof(float);
  if (bytes > 0) {
    std::memcpy(values.data(), tensor.data().data() + static_cast<size_t>(row) * bytes, bytes);
  }
  return values;
}

}  // namespace

grpc::Status FakeSessions::Answer(grpc::ServerContext& context, const std::string& rpc,
                                  const Executor& execute) {
  std::unique_lock<std::mutex> lock(mutex_);
  ++calls_[rpc];
  Fault fault;
  if (!faults_.empty()) {
    fault = faults_.front();
    faults_.pop_front();
  }
  if (fault.kind == Fault::kLoseCall) return {Code::UNAVAILABLE, "lost"};
  if (fault.kind == Fault::kFail) return Refuse(context, Code::INVALID_ARGUMENT, "wrong");
  if (fault.kind == Fault::kRefuse) {
    return Refuse(context, Code::RESOURCE_EXHAUSTED, "full", fault.retry_delay_seconds);
  }
  const auto hang = [&] {
    lock.unlock();
    released_.WaitForNotificationWithTimeout(kTooLong);
    lock.lock();
  };
  if (fault.kind == Fault::kHangBefore) hang();
  grpc::Status status = execute(fault);
  if (fault.kind == Fault::kHangBefore) {
    ++late_;
    if (!status.ok()) ++late_refused_;
    late_changed_.notify_all();
  }
  if (fault.kind == Fault::kHangAfter) hang();
  if (fault.kind == Fault::kLoseAnswer) return {Code::UNAVAILABLE, "lost"};
  if (!status.ok()) return Refuse(context, status.error_code(), status.error_message());
  return status;
}

grpc::Status FakeSessions::Execute(const v1::ForwardRequest& request,
                                   v1::ForwardResponse& response) {
  const v1::SessionBatch& batch = request.past_key_value().sessions();
  const CacheKey key = {request.layer().stack(), request.layer().layer(),
                        request.layer().kind() == v1::ATTENTION_KIND_CROSS};
  std::vector<std::pair<Cache*, Cache>> changed;
  std::vector<float> output;
  for (int row = 0; row < batch.session_ids_size(); ++row) {
    const auto session = sessions_.find(batch.session_ids(row));
    if (session == sessions_.end()) return {Code::NOT_FOUND, "no such session"};
    Cache& own = session->second[key];
    Cache cache = own;
    const std::vector<float> added = Row(request.hidden_states(), row);
    if (grpc::Status status = Apply(batch, row, added, cache); !status.ok()) return status;
    float sum = 0;
    for (size_t i = 0; i < cache.tokens.size(); ++i) {
      sum += cache.tokens[i];
      if (i >= cache.before_last) output.push_back(sum);
    }
    if (batch.mode() != v1::CACHE_MODE_APPEND) cache = own;
    response.add_cache_length(static_cast<int64_t>(cache.tokens.size()));
    changed.emplace_back(&own, cache);
  }
  for (const auto& [own, cache] : changed) *own = cache;
  *response.mutable_output() = request.hidden_states();
  response.mutable_output()->set_data(reinterpret_cast<const char*>(output.data()),
                                      output.size() * sizeof(float));
  return grpc::Status::OK;
}

grpc::Status FakeSessions::Forward(grpc::ServerContext* context, const v1::ForwardRequest* request,
                                   v1::ForwardResponse* response) {
  return Answer(*context, "Forward", [&](const Fault& fault) {
    forwards.push_back(*request);
    grpc::Status status = Execute(*request, *response);
    if (fault.kind == Fault::kForgetLengths) response->clear_cache_length();
    return status;
  });
}

// Keys stand for hidden states.
grpc::Status FakeSessions::Attend(grpc::ServerContext* context, const v1::AttendRequest* request,
                                  v1::AttendResponse* response) {
  return Answer(*context, "Attend", [&](const Fault&) {
    v1::ForwardRequest forward;
    *forward.mutable_layer() = request->layer();
    *forward.mutable_past_key_value() = request->past_key_value();
    *forward.mutable_hidden_states() = request->key();
    v1::ForwardResponse answer;
    grpc::Status status = Execute(forward, answer);
    *response->mutable_output() = answer.output();
    *response->mutable_cache_length() = answer.cache_length();
    return status;
  });
}

grpc::Status FakeSessions::OpenSession(grpc::ServerContext* context,
                                       const v1::OpenSessionRequest* request,
                                       v1::OpenSessionResponse* response) {
  return Answer(*context, "OpenSession", [&](const Fault&) {
    opened = *request;
    response->set_session_id(absl::StrCat("session-", ++opened_count_));
    response->set_time_to_live_seconds(600);
    response->set_server_epoch("epoch");
    sessions_[response->session_id()];
    return grpc::Status::OK;
  });
}

grpc::Status FakeSessions::ForkSession(grpc::ServerContext* context,
                                       const v1::ForkSessionRequest* request,
                                       v1::ForkSessionResponse* response) {
  return Answer(*context, "ForkSession", [&](const Fault&) -> grpc::Status {
    const auto parent = sessions_.find(request->session_id());
    if (parent == sessions_.end()) return {Code::NOT_FOUND, "no such session"};
    Caches caches = parent->second;
    for (auto& [key, cache] : caches) {
      cache.may_retry = false;
      if (!request->has_length() || std::get<bool>(key)) continue;
      const auto length = static_cast<size_t>(request->length());
      cache.tokens.resize(std::min(cache.tokens.size(), length));
    }
    for (uint32_t i = 0; i < std::max(request->count(), 1u); ++i) {
      response->add_session_ids(absl::StrCat("session-", ++opened_count_));
      sessions_[response->session_ids(static_cast<int>(i))] = caches;
    }
    return grpc::Status::OK;
  });
}

grpc::Status FakeSessions::GetSession(grpc::ServerContext* context,
                                      const v1::GetSessionRequest* request,
                                      v1::GetSessionResponse* response) {
  return Answer(*context, "GetSession", [&](const Fault&) -> grpc::Status {
    const auto session = sessions_.find(request->session_id());
    if (session == sessions_.end()) return {Code::NOT_FOUND, "no such session"};
    for (const auto& [key, cache] : session->second) {
      v1::LayerCache& layer = *response->add_layers();
      layer.set_length(static_cast<int64_t>(cache.tokens.size()));
      layer.set_last_step(cache.step);
    }
    return grpc::Status::OK;
  });
}

grpc::Status FakeSessions::CloseSession(grpc::ServerContext* context,
                                        const v1::CloseSessionRequest* request,
                                        v1::CloseSessionResponse*) {
  return Answer(*context, "CloseSession", [&](const Fault&) -> grpc::Status {
    if (sessions_.erase(request->session_id()) == 1) return grpc::Status::OK;
    return {Code::NOT_FOUND, "no such session"};
  });
}

void FakeSessions::Expect(const std::vector<Fault>& faults) {
  const std::lock_guard<std::mutex> lock(mutex_);
  faults_.assign(faults.begin(), faults.end());
}

void FakeSessions::Release() {
  if (!released_.HasBeenNotified()) released_.Notify();
}

void FakeSessions::AwaitLate(int count) {
  std::unique_lock<std::mutex> lock(mutex_);
  late_changed_.wait_for(lock, absl::ToChronoSeconds(kTooLong), [&] { return late_ >= count; });
}

std::vector<float> FakeSessions::Tokens(const std::string& id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return sessions_.at(id)[{"", 0, false}].tokens;
}

std::vector<std::string> FakeSessions::Open() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::string> ids;
  for (const auto& [id, caches] : sessions_) ids.push_back(id);
  return ids;
}

int FakeSessions::calls(const std::string& rpc) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return calls_[rpc];
}

int FakeSessions::late_refused() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return late_refused_;
}

}  // namespace attn::client
