// Calls on sessions in few words, for tests of their rules.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "tests/core/session_fixture.h"

namespace attn::testing {

using Ids = std::vector<std::int64_t>;

inline constexpr std::uint64_t kCacheBytes = 1 << 20;
inline constexpr std::uint64_t kPlainBlock = 64 * (5 + 16) * 2;  // of "plain", in float16

inline Ids Range(std::int64_t first, std::int64_t count) {
  Ids ids;
  for (std::int64_t i = 0; i < count; ++i) ids.push_back(first + i);
  return ids;
}

inline Ids Joined(Ids ids, const Ids& more) {
  ids.insert(ids.end(), more.begin(), more.end());
  return ids;
}

class CacheCallTest : public ::testing::Test {
 protected:
  using Sessions = std::vector<std::shared_ptr<Session>>;

  // Rows of tokens on layer `layer` of a model; as many queries as tokens.
  LayerCall Tokens(const std::string& model, const std::vector<Ids>& rows,
                   std::uint32_t layer = 0) {
    LayerCall call;
    call.key.layer = layer;
    call.dims = model.empty() ? CacheDims{2, 3, 4, DType::kUnspecified}
                              : fixture_.DimsOfLayer(model, call.key);
    for (const Ids& ids : rows) call.rows.push_back({ids, std::ssize(ids)});
    return call;
  }
  // Queries alone, on what is there.
  LayerCall Reading(const std::string& model, std::int64_t queries, std::uint32_t layer = 0) {
    LayerCall call = Tokens(model, {{}}, layer);
    call.request.mode = CacheMode::kReadOnly;
    call.rows[0].queries = queries;
    return call;
  }
  absl::Status Run(const Sessions& sessions, const LayerCall& call) {
    return fixture_.Run(sessions, call).status();
  }
  void Append(const std::shared_ptr<Session>& session, const Ids& ids, std::uint32_t layer = 0,
              std::uint64_t step = 0) {
    LayerCall call = Tokens(session->model(), {ids}, layer);
    call.request.step = {step};
    const absl::Status status = Run({session}, call);
    EXPECT_TRUE(status.ok()) << status;
  }
  static const LayerCache& Layer(const Session& session, std::uint32_t layer = 0) {
    return SessionInspector::Layers(session).at({"", layer, AttentionKind::kSelf});
  }
  static std::string Differs(const std::shared_ptr<Session>& session, const Ids& ids,
                             std::uint32_t layer = 0) {
    return SessionFixture::Differs(*session, {"", layer, AttentionKind::kSelf}, ids);
  }
  // The code, the reason, and the details that programs read.
  static void ExpectError(const absl::Status& status, absl::StatusCode code,
                          const std::string& reason, const ErrorDetails& details) {
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_EQ(ErrorReason(status), reason) << status;
    std::map<std::string, std::string> given = ErrorDetailsOf(status);
    for (const auto& [name, value] : details) EXPECT_EQ(given[name], value) << name;
  }

  SessionFixture fixture_{kCacheBytes};
};

}  // namespace attn::testing
